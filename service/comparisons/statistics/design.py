"""Define what is fixed when a comparison is created, before anybody has voted."""

from dataclasses import dataclass, field

from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.noninferiority import Bounds
from service.comparisons.statistics.screening import ScreeningRules
from service.comparisons.statistics.votes import Ties

MOST_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Design:
    """The settings that a result is read with; none of them may follow from the votes.

    Attributes:
        candidate: the mode in question, as sentences name it.
        reference: the mode that it is held against.
        criteria: ids from `criteria.BY_ID`; the candidate must be non-inferior in each.
        seed: of the bootstrap and of the sign-flip test.
    """

    candidate: str
    reference: str
    criteria: tuple[str, ...]
    ties: Ties
    bounds: Bounds
    screening: ScreeningRules = field(default_factory=ScreeningRules)
    bootstrap_draws: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse criteria that nobody was asked about."""
        unknown = [name for name in self.criteria if name not in BY_ID]
        if unknown:
            raise ValueError(f"criterion {unknown[0]} is unknown; choose from {', '.join(BY_ID)}")
        if not self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise ValueError(
                f"criteria are {list(self.criteria)}; name at least one, and none of them twice"
            )
        if not 100 <= self.bootstrap_draws <= MOST_DRAWS:
            raise ValueError(
                f"bootstrap_draws is {self.bootstrap_draws}; choose from 100 to {MOST_DRAWS}"
            )
