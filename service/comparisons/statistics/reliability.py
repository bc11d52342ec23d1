"""Measure how far votes can be trusted: agreement, repeats, and preference for a side."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.comparisons.statistics.intervals import Interval, wilson
from service.comparisons.statistics.significance import binomial_test
from service.comparisons.statistics.votes import Outcome, PairKind, Side, Vote, counted

RANK = {Outcome.LOSS: 0, Outcome.TIE: 1, Outcome.WIN: 2}


class Scale(StrEnum):
    """How far apart Krippendorff's alpha takes two votes to be."""

    NOMINAL = "nominal"
    ORDINAL = "ordinal"


def krippendorff_alpha(units: Iterable[Sequence[int]], scale: Scale) -> float | None:
    """Return Krippendorff's alpha; each unit holds the values that raters gave it.

    Missing values are simply absent. 1 is perfect agreement, 0 that of chance. None if it is not
    defined: no unit has two values, or all values are equal.
    """
    weights: dict[tuple[int, int], float] = defaultdict(float)
    for unit in units:
        if len(unit) < 2:
            continue
        counts = Counter(unit)
        for first, first_count in counts.items():
            for second, second_count in counts.items():
                pairs = first_count * (second_count - (first == second))
                weights[first, second] += pairs / (len(unit) - 1)
    totals: dict[int, float] = defaultdict(float)
    for (first, _), weight in weights.items():
        totals[first] += weight
    number = sum(totals.values())
    distances = _distances(totals, scale)
    expected = sum(totals[a] * totals[b] * apart for (a, b), apart in distances.items())
    if number < 2 or expected == 0:
        return None
    observed = sum(weights.get(pair, 0.0) * apart for pair, apart in distances.items())
    return 1 - (number - 1) * observed / expected


def _distances(totals: dict[int, float], scale: Scale) -> dict[tuple[int, int], float]:
    """Return the squared distance of every two values."""
    values = sorted(totals)
    if scale is Scale.NOMINAL:
        return {(a, b): float(a != b) for a in values for b in values}
    distances = {}
    for a in values:
        for b in values:
            between = sum(totals[v] for v in values if min(a, b) <= v <= max(a, b))
            distances[a, b] = 0.0 if a == b else (between - (totals[a] + totals[b]) / 2) ** 2
    return distances


def vote_agreement(votes: Iterable[Vote], scale: Scale) -> float | None:
    """Return the agreement of raters on test pairs, each pair with each criterion a unit."""
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for vote in counted(votes):
        units[vote.pair_id, vote.criterion].append(RANK[vote.outcome])
    # In order, because sums of floats depend on it in their last bits, and a result must not.
    return krippendorff_alpha([sorted(units[name]) for name in sorted(units)], scale)


@dataclass(frozen=True, slots=True)
class SideBias:
    """How often raters preferred the left video, whatever stood there.

    Attributes:
        candidate_left: how many of the decisive votes had the candidate on the left. Far from half,
            a preference for the candidate looks like one for a side.
        p_value: of the exact binomial test against one half.
    """

    left: int
    decisive: int
    candidate_left: int
    interval: Interval | None
    p_value: float


def side_bias(votes: Iterable[Vote]) -> SideBias:
    """Test for a preference of a side in first votes on test and identical pairs."""
    decisive = [
        vote
        for vote in votes
        if vote.chosen_side and vote.kind is not PairKind.GOLD and not vote.is_repeat
    ]
    left = sum(vote.chosen_side is Side.LEFT for vote in decisive)
    return SideBias(
        left=left,
        decisive=len(decisive),
        candidate_left=sum(vote.candidate_side is Side.LEFT for vote in decisive),
        interval=wilson(left, len(decisive)),
        p_value=binomial_test(left, len(decisive)),
    )


@dataclass(frozen=True, slots=True)
class RepeatConsistency:
    """How raters voted when a pair came back with its sides swapped.

    Attributes:
        same: repeats with the same outcome.
        reversed: repeats where win became loss or loss became win: the same side was chosen twice.
        interval: of the share of `same`.
    """

    repeats: int
    same: int
    reversed: int
    interval: Interval | None


def repeat_consistency(votes: Iterable[Vote]) -> RepeatConsistency:
    """Compare repeats with the first votes of the same rater, pair and criterion."""
    everything = list(votes)
    first = {_key(vote): vote.outcome for vote in everything if not vote.is_repeat}
    outcomes = [
        (first[_key(vote)], vote.outcome)
        for vote in everything
        if vote.is_repeat and _key(vote) in first
    ]
    same = sum(before is after for before, after in outcomes)
    reversals = sum({before, after} == {Outcome.WIN, Outcome.LOSS} for before, after in outcomes)
    return RepeatConsistency(len(outcomes), same, reversals, wilson(same, len(outcomes)))


def _key(vote: Vote) -> tuple[str, str, str]:
    return vote.rater_id, vote.pair_id, vote.criterion
