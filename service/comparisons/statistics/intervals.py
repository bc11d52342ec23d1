"""Compute intervals of shares and means, for independent and for clustered votes.

Votes of one rater resemble each other, and so do votes on one prompt. `wilson` ignores that. Two
methods respect it: `clustered_share` estimates the variance and is what verdicts are made from;
`bootstrap_share` draws raters and prompts anew. docs/comparisons.md has both in words, with the
coverage that was measured.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import mul

from service.comparisons.statistics.distributions import (
    normal_quantile,
    student_quantile,
    student_tails,
)
from service.comparisons.statistics.votes import Score


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval with its two-sided level, such as 0.9."""

    low: float
    high: float
    level: float


def wilson(successes: float, trials: float, level: float = 0.95) -> Interval | None:
    """Return the Wilson interval of a share of independent votes; None without votes."""
    if trials <= 0:
        return None
    return _wilson(successes / trials, trials, normal_quantile((1 + level) / 2), level)


def _wilson(share: float, trials: float, critical: float, level: float) -> Interval:
    square = critical * critical / trials
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square * square / 4) / (1 + square)
    return Interval(max(0.0, centre - half), min(1.0, centre + half), level)


@dataclass(frozen=True, slots=True)
class ClusteredShare:
    """A share with the precision that clustered votes allow.

    Attributes:
        effective_votes: so many independent votes would be as precise.
        design_effect: the factor by which clustering multiplies the variance; at least 1.
        df: degrees of freedom of the estimated variance.
    """

    share: float
    votes: int
    raters: int
    prompts: int
    effective_votes: float
    design_effect: float
    df: float

    def interval(self, level: float) -> Interval:
        """Return the Wilson interval of the effective votes, with Student's quantile."""
        critical = student_quantile((1 + level) / 2, self.df)
        return _wilson(self.share, self.effective_votes, critical, level)

    @property
    def p_value(self) -> float:
        """The two-sided p-value that the share is one half; it agrees with the intervals."""
        return student_tails(2 * (self.share - 0.5) * math.sqrt(self.effective_votes), self.df)


def clustered_share(scores: Sequence[Score]) -> ClusteredShare | None:
    """Return the share of the candidate with its two-way clustered precision.

    The variance is that of Cameron, Gelbach and Miller: by rater, plus by prompt, minus by both. It
    is at least that of independent votes. None with fewer than two raters or two prompts, whose
    votes cannot tell how much raters or prompts differ.
    """
    votes = len(scores)
    raters = len({score.rater_id for score in scores})
    prompts = len({score.prompt_id for score in scores})
    fewest = min(raters, prompts)
    if fewest < 2:
        return None
    total = math.fsum(score.value for score in scores)
    squares = math.fsum(score.value * score.value for score in scores)
    share = total / votes
    if total in (0.0, float(votes)):
        # Unanimous votes do not show whether they are independent; assume the worst.
        return ClusteredShare(
            share, votes, raters, prompts, fewest, votes / fewest, float(fewest - 1)
        )
    by_rater = _cluster_variance(scores, share, lambda score: score.rater_id)
    by_prompt = _cluster_variance(scores, share, lambda score: score.prompt_id)
    by_both = _cluster_variance(scores, share, lambda score: (score.rater_id, score.prompt_id))
    # One win and one loss more keep the variance above 0 when all votes are ties.
    smoothed = (total + 1) / (votes + 2)
    independent = ((squares + 1) / (votes + 2) - smoothed * smoothed) / (votes + 2)
    variance = max(by_rater + by_prompt - by_both, independent)
    spread = by_rater**2 / (raters - 1) + by_prompt**2 / (prompts - 1)
    df = variance * variance / spread if spread > 0 else math.inf
    return ClusteredShare(
        share=share,
        votes=votes,
        raters=raters,
        prompts=prompts,
        effective_votes=smoothed * (1 - smoothed) / variance,
        design_effect=variance / independent,
        df=min(max(df, fewest - 1.0), votes - 1.0),
    )


def _cluster_variance(
    scores: Iterable[Score], share: float, cluster_of: Callable[[Score], Hashable]
) -> float:
    """Return the variance of the share if clusters are independent of each other."""
    sums: dict[Hashable, list[float]] = defaultdict(list)
    votes = 0
    for score in scores:
        sums[cluster_of(score)].append(score.value - share)
        votes += 1
    clusters = len(sums)
    # fsum is exact, so that the order of votes cannot change a result.
    squares = math.fsum(math.fsum(residuals) ** 2 for residuals in sums.values())
    return clusters / (clusters - 1) * squares / (votes * votes)


def bootstrap_share(
    scores: Sequence[Score], level: float, draws: int, seed: int
) -> Interval | None:
    """Return the percentile interval of the pigeonhole bootstrap (Owen, 2007).

    Each draw takes as many raters and, independently, as many prompts with replacement. A vote
    counts as often as its rater was drawn times its prompt. None where `clustered_share` is None.
    """
    raters = sorted({score.rater_id for score in scores})
    prompts = sorted({score.prompt_id for score in scores})
    if min(len(raters), len(prompts)) < 2:
        return None
    rows = _rows(scores, raters, prompts)
    rng = random.Random(seed)
    shares: list[float] = []
    while len(shares) < draws:
        rater_weights, prompt_weights = _draw(rng, len(raters)), _draw(rng, len(prompts))
        total = count = 0.0
        for weight, (prompt_indices, sums, votes) in zip(rater_weights, rows, strict=True):
            if weight:
                drawn = [prompt_weights[index] for index in prompt_indices]
                total += weight * sum(map(mul, drawn, sums))
                count += weight * sum(map(mul, drawn, votes))
        if count:  # raters who judged few prompts may be drawn without any of them
            shares.append(total / count)
    shares.sort()
    tail = (1 - level) / 2
    return Interval(quantile(shares, tail), quantile(shares, 1 - tail), level)


def _rows(
    scores: Sequence[Score], raters: Sequence[str], prompts: Sequence[str]
) -> list[tuple[list[int], list[float], list[int]]]:
    """Return for each rater the indices of prompts, the sums of scores and the numbers of votes."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for score in scores:
        cells[score.rater_id, score.prompt_id].append(score.value)
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    rows: dict[str, tuple[list[int], list[float], list[int]]]
    rows = {rater: ([], [], []) for rater in raters}
    for (rater, prompt), values in sorted(cells.items()):
        indices, sums, votes = rows[rater]
        indices.append(index_of[prompt])
        sums.append(sum(values))
        votes.append(len(values))
    return [rows[rater] for rater in raters]


def _draw(rng: random.Random, size: int) -> list[int]:
    """Return how often each of `size` things is drawn in `size` draws with replacement."""
    weights = [0] * size
    for index in rng.choices(range(size), k=size):
        weights[index] += 1
    return weights


def quantile(ordered: Sequence[float], probability: float) -> float:
    """Return a quantile of ordered values, interpolated linearly."""
    if len(ordered) == 1:
        return ordered[0]
    position = probability * (len(ordered) - 1)
    below = min(int(position), len(ordered) - 2)
    return ordered[below] + (position - below) * (ordered[below + 1] - ordered[below])


@dataclass(frozen=True, slots=True)
class ClusteredMean:
    """A mean of values in clusters; `interval` is None with fewer than two clusters."""

    mean: float
    values: int
    clusters: int
    interval: Interval | None


def clustered_mean(
    values: Sequence[tuple[str, float]],
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> ClusteredMean | None:
    """Return the mean of (cluster, value) with Student's interval; None without values.

    The interval is cut at the least and the largest value that there can be.
    """
    if not values:
        return None
    mean = math.fsum(value for _, value in values) / len(values)
    residuals: dict[str, list[float]] = defaultdict(list)
    for cluster, value in values:
        residuals[cluster].append(value - mean)
    clusters = len(residuals)
    if clusters < 2:
        return ClusteredMean(mean, len(values), clusters, None)
    squares = math.fsum(math.fsum(each) ** 2 for each in residuals.values())
    error = math.sqrt(clusters / (clusters - 1) * squares) / len(values)
    half = student_quantile((1 + level) / 2, clusters - 1) * error
    low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return ClusteredMean(mean, len(values), clusters, Interval(low, high, level))
