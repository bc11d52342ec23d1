"""Simulate blind comparisons: `python -m benchmarks.quality.comparison_statistics`.

Raters and prompts have effects of their own, so that votes are clustered both ways, and the true
share is known. Each row says how often the intervals of `service.comparisons.statistics` contain
it, or how often a verdict or test comes out. The Wilson interval of independent votes is the
baseline.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from time import perf_counter
from typing import Annotated

import typer

from benchmarks import report
from service.comparisons.statistics.intervals import (
    Interval,
    bootstrap_share,
    clustered_share,
    wilson,
)
from service.comparisons.statistics.noninferiority import Bounds, Verdict, judge
from service.comparisons.statistics.significance import binomial_test, prompt_means, sign_flip_test
from service.comparisons.statistics.votes import Score, Ties

LEVEL = 0.9  # the level of the interval that verdicts are read from
NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Size:
    """How many raters judge how many of the prompts."""

    raters: int
    prompts: int
    each: int

    def __str__(self) -> str:
        """Name the size as rows do."""
        return f"{self.raters} raters x {self.each} of {self.prompts} prompts"


@dataclass(frozen=True, slots=True)
class World:
    """What votes come from: a normal preference, tied where it is small.

    Attributes:
        rater_sd: standard deviation between raters; that of a single vote is 1.
        tie_band: a preference of at most this size is a tie.
    """

    share: float
    rater_sd: float
    prompt_sd: float
    tie_band: float
    ties: Ties

    def mean_preference(self) -> float:
        """Return the mean preference that leads to the true share."""
        spread = math.sqrt(1 + self.rater_sd**2 + self.prompt_sd**2)
        low, high = -5.0, 5.0
        for _ in range(60):
            middle = (low + high) / 2
            win = NORMAL.cdf((middle - self.tie_band) / spread)
            loss = NORMAL.cdf((-middle - self.tie_band) / spread)
            tie = 1 - win - loss
            share = win + tie / 2 if self.ties is Ties.HALF else win / (win + loss)
            low, high = (middle, high) if share < self.share else (low, middle)
        return (low + high) / 2


EVEN = World(share=0.5, rater_sd=0.3, prompt_sd=0.4, tie_band=0.3, ties=Ties.LEFT_OUT)
SIZES = (
    Size(4, 10, 10),
    Size(6, 20, 20),
    Size(12, 40, 40),
    Size(24, 40, 40),
    Size(24, 60, 20),
    Size(50, 100, 20),
)
DESIGN_SIZE = Size(12, 40, 40)


def scenarios(bounds: Bounds) -> Iterator[tuple[str, Size, World]]:
    """List what is simulated: all sizes at one half and at the limit, then other worlds."""
    for size in SIZES:
        yield f"{size}, even", size, EVEN
        yield f"{size}, at the limit", size, replace(EVEN, share=bounds.limit)
    size = DESIGN_SIZE
    yield f"{size}, far below", size, replace(EVEN, share=bounds.limit - 0.15)
    yield f"{size}, even, independent", size, replace(EVEN, rater_sd=0.0, prompt_sd=0.0)
    yield f"{size}, even, strong effects", size, replace(EVEN, rater_sd=0.6, prompt_sd=0.6)
    yield f"{size}, even, prompts alike", size, replace(EVEN, prompt_sd=0.0)
    half = replace(EVEN, ties=Ties.HALF)
    yield f"{size}, even, ties half", size, half
    yield f"{size}, at the limit, ties half", size, replace(half, share=bounds.limit)


def simulate(size: Size, world: World, rng: random.Random) -> list[Score]:
    """Draw the scores of one comparison."""
    mean = world.mean_preference()
    prompt_effects = [rng.gauss(0, world.prompt_sd) for _ in range(size.prompts)]
    found = []
    for rater in range(size.raters):
        rater_mean = mean + rng.gauss(0, world.rater_sd)
        for prompt in rng.sample(range(size.prompts), size.each):
            preference = rater_mean + prompt_effects[prompt] + rng.gauss(0, 1)
            tied = abs(preference) <= world.tie_band
            if not tied or world.ties is Ties.HALF:
                value = 0.5 if tied else float(preference > 0)
                found.append(Score(f"r{rater:03d}", f"p{prompt:03d}", value))
    return found


def measure(
    name: str, size: Size, world: World, bounds: Bounds, comparisons: int, draws: int
) -> Iterator[report.Row]:
    """Simulate one scenario; yield the rates of its intervals, verdicts and tests."""
    rng = random.Random(name)
    seen: Counter[str] = Counter()
    effects = votes = 0.0
    for number in range(comparisons):
        scores = simulate(size, world, rng)
        share = clustered_share(scores)
        assert share is not None, "every size has two raters and two prompts"
        effects += share.design_effect
        votes += share.votes
        total = sum(score.value for score in scores)
        seen["wilson"] += _contains(wilson(total, len(scores), LEVEL), world.share)
        seen["clustered"] += _contains(share.interval(LEVEL), world.share)
        seen["bootstrap"] += _contains(bootstrap_share(scores, LEVEL, draws, number), world.share)
        seen[judge(share, bounds)[0]] += 1
        seen["difference"] += share.p_value <= 0.05
        differences = [mean - 0.5 for mean in prompt_means(scores).values()]
        seen["sign flip"] += sign_flip_test(differences, number, draws) <= 0.05
        if world.ties is Ties.LEFT_OUT:
            seen["binomial"] += binomial_test(round(total), len(scores)) <= 0.05
    naive = seen["wilson"] / comparisons
    yield report.Row(f"{name}: votes counted, mean", votes / comparisons, "votes")
    yield report.Row(f"{name}: design effect, mean", effects / comparisons, "x")
    for method in ("clustered", "bootstrap"):
        yield rate(f"{name}: coverage, {method}", seen[method], comparisons, naive)
    for verdict in Verdict:
        yield rate(f"{name}: {verdict}", seen[verdict], comparisons)
    independent = seen["binomial"] / comparisons if world.ties is Ties.LEFT_OUT else None
    for what, key in (("clustered", "difference"), ("sign flip", "sign flip")):
        yield rate(f"{name}: {what} p <= 0.05", seen[key], comparisons, independent)


def _contains(interval: Interval | None, share: float) -> bool:
    return interval is not None and interval.low <= share <= interval.high


def rate(what: str, hits: int, total: int, baseline: float | None = None) -> report.Row:
    """Return how often something happened, with its 95 % interval."""
    interval = wilson(hits, total)
    assert interval is not None, "there is at least one comparison"
    return report.Row(
        what, hits / total, f"of {total}", baseline, low=interval.low, high=interval.high
    )


def main(
    comparisons: Annotated[int, typer.Option(min=1, help="For each scenario.")] = 1000,
    draws: Annotated[int, typer.Option(min=100, help="Of bootstrap and sign flips.")] = 300,
    margin: float = 0.1,
) -> None:
    """Simulate all scenarios and write the result."""
    bounds = Bounds(margin)
    start = perf_counter()
    rows = []
    for name, size, world in scenarios(bounds):
        rows += report.log_rows(measure(name, size, world, bounds, comparisons, draws))
    rows.append(report.Row("time", perf_counter() - start, "s"))
    report.print_table(rows)
    settings = {
        "comparisons": comparisons,
        "draws": draws,
        "margin": margin,
        "alpha": bounds.alpha,
        "interval_level": LEVEL,
        "rater_sd": EVEN.rater_sd,
        "prompt_sd": EVEN.prompt_sd,
        "strong_sd": 0.6,
        "tie_band": EVEN.tie_band,
        "baseline": "wilson interval and binomial test of independent votes",
    }
    report.save(report.result("comparison-statistics", "cpu", settings, rows))


if __name__ == "__main__":
    typer.run(main)
