"""Compute how long jobs wait, for numbers of cards: several simulations of random arrivals each."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.serving.capacity.queue_model import Fleet, Simulated, simulate
from benchmarks.serving.capacity.workload import Kind, poisson, utilization

WARM_UP: Final = 0.2
"""This share of the first arrivals is not counted: they find an empty queue."""

JOBS_A_CARD: Final = 50
"""At least so many jobs are simulated for each card, or the queue would still be filling."""

T_95: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t for a 95 % confidence interval, by the number of simulations."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over simulations, with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Waits:
    """How long jobs wait for their first start, in seconds, and what they ask of the cards.

    Attributes:
        percentiles: by percent; None if more is asked for than the cards can do.
        utilization: the share of the cards' time that is asked for.
        failed: the share of jobs that lost their last worker.
    """

    cards: int
    utilization: float
    percentiles: dict[int, Estimate] | None
    failed: float = 0.0


def expected_waits(
    kinds: Sequence[Kind],
    fleet: Fleet,
    *,
    jobs: int = 20_000,
    runs: int = 5,
    percents: Sequence[int] = (50, 90, 99),
) -> Waits:
    """Simulate Poisson arrivals `runs` times, at least `jobs` each."""
    asked = utilization(kinds, fleet.cards, fleet.between_s)
    if asked >= 1:
        return Waits(fleet.cards, asked, None)
    if runs not in T_95:
        raise ValueError(f"{runs} simulations give no interval here; take 2 to {max(T_95)}")
    jobs = max(jobs, JOBS_A_CARD * fleet.cards)
    found = [simulate(poisson(kinds, jobs, seed), fleet, seed) for seed in range(runs)]
    percentiles = {
        percent: _estimate([percentile(_settled(each), percent) for each in found])
        for percent in percents
    }
    failed = sum(each.failed for each in found) / (jobs * runs)
    return Waits(fleet.cards, asked, percentiles, failed)


def percentile(seconds: Sequence[float], percent: float) -> float:
    """Return the least value that so many of all do not exceed."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _settled(run: Simulated) -> list[float]:
    return run.waits_s[int(WARM_UP * len(run.waits_s)) :]


def _estimate(values: Sequence[float]) -> Estimate:
    mean = statistics.fmean(values)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, max(0.0, mean - half), mean + half)
