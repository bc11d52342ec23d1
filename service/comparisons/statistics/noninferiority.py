"""Judge whether the candidate is as good as the reference, up to a margin fixed beforehand.

The candidate is non-inferior if even the low end of its share's interval is above one half minus
the margin. Each end is a one-sided bound, so that the interval's level is 1 - 2 alpha.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from service.comparisons.statistics.distributions import binomial_upper_tail, normal_quantile
from service.comparisons.statistics.intervals import ClusteredShare, Interval

LEAST_MARGIN, MOST_MARGIN = 0.01, 0.49
MOST_DECISIVE_MARGIN = 0.49


class Verdict(StrEnum):
    """What the interval says about the margin."""

    NON_INFERIOR = "non-inferior"
    INFERIOR = "inferior"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The level and margin of a verdict, and what the planned number of votes assumes.

    Attributes:
        alpha: the most that a wrong `non-inferior` may happen, when the share is at the limit.
        power: how often the planned votes lead to `non-inferior` if `true_share` is right.
    """

    margin: float
    alpha: float = 0.05
    power: float = 0.8
    true_share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that no verdict can be made from."""
        _refuse_outside("margin", self.margin, LEAST_MARGIN, MOST_MARGIN)
        _refuse_outside("alpha", self.alpha, 0.001, 0.2)
        _refuse_outside("power", self.power, 0.5, 0.99)
        _refuse_outside("true_share", self.true_share, self.limit + 0.01, 0.99)

    @property
    def limit(self) -> float:
        """The share that the candidate must be shown to exceed."""
        return 0.5 - self.margin

    @property
    def level(self) -> float:
        """The two-sided level of the interval whose ends are the one-sided bounds."""
        return 1 - 2 * self.alpha


def _refuse_outside(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value:g}; choose one from {low:g} to {high:g}")


def judge(share: ClusteredShare | None, bounds: Bounds) -> tuple[Verdict, Interval | None]:
    """Return the verdict and the interval that it was read from."""
    if share is None:
        return Verdict.INCONCLUSIVE, None
    interval = share.interval(bounds.level)
    if interval.low > bounds.limit:
        return Verdict.NON_INFERIOR, interval
    if interval.high < bounds.limit:
        return Verdict.INFERIOR, interval
    return Verdict.INCONCLUSIVE, interval


def decisive_votes_needed(bounds: Bounds, tie_share: float = 0.0) -> int:
    """Return how many independent decisive votes the exact binomial test needs.

    It is the number from which on every larger one has the power, too: with whole numbers of votes,
    power goes up and down. Where ties count as half, they dilute the share, so that the margin
    among the decisive votes is larger; pass their share then, and 0 where they are left out.
    """
    decisive = max(1.0 - tie_share, 1e-9)
    limit = 0.5 - min(bounds.margin / decisive, MOST_DECISIVE_MARGIN)
    true_share = min(max(0.5 + (bounds.true_share - 0.5) / decisive, limit + 0.001), 0.999)
    z_alpha, z_power = normal_quantile(1 - bounds.alpha), normal_quantile(bounds.power)
    error_at_limit = z_alpha * math.sqrt(limit * (1 - limit))
    error_at_true = z_power * math.sqrt(true_share * (1 - true_share))
    about = ((error_at_limit + error_at_true) / (true_share - limit)) ** 2
    votes = math.ceil(about + 4 * math.sqrt(about) + 30)
    wins = votes
    while votes > 0:
        while wins > 0 and binomial_upper_tail(wins - 1, votes, limit) <= bounds.alpha:
            wins -= 1
        # `wins` are the fewest that reject; with more than all votes, nothing rejects.
        rejects = binomial_upper_tail(wins, votes, limit) <= bounds.alpha
        if not rejects or binomial_upper_tail(wins, votes, true_share) < bounds.power:
            return votes + 1
        votes -= 1
        wins = min(wins, votes)
    return 1


@dataclass(frozen=True, slots=True)
class VotesNeeded:
    """How many decisive votes a verdict is expected to need.

    Attributes:
        independent: if votes were independent.
        clustered: that times the design effect.
        missing: how many of these have not been given; 0 once the verdict is made.
    """

    independent: int
    design_effect: float
    clustered: int
    missing: int


def votes_needed(
    share: ClusteredShare | None, decisive: int, tie_share: float, bounds: Bounds
) -> VotesNeeded:
    """Return the decisive votes needed, with the design effect estimated from those given.

    It assumes that the votes to come spread over raters and prompts as the given ones do. Without
    an estimate the design effect is 1, which is too low for real raters.
    """
    independent = decisive_votes_needed(bounds, tie_share)
    design_effect = max(1.0, share.design_effect) if share else 1.0
    clustered = math.ceil(independent * design_effect)
    is_open = judge(share, bounds)[0] is Verdict.INCONCLUSIVE
    missing = max(0, clustered - decisive) if is_open else 0
    return VotesNeeded(independent, design_effect, clustered, missing)
