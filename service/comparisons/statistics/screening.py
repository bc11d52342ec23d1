"""Find raters whose votes on gold, identical and repeated pairs show that they cannot be counted.

The rules look at checks only, never at which mode a rater preferred, so that leaving raters out
cannot favour one. They are fixed when the comparison is created.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.comparisons.statistics.reliability import repeat_consistency
from service.comparisons.statistics.votes import Outcome, PairKind, Vote


@dataclass(frozen=True, slots=True)
class ScreeningRules:
    """The most that a rater may get wrong, as shares; 1 turns a rule off.

    Attributes:
        most_gold_failed: of the gold pairs; failed is one without more wins than losses of the
            intact video.
        most_identical_different: of the identical pairs; judged different is one where more than
            half of the votes are decisive.
        most_repeats_reversed: of the repeated votes; reversed is one that chose the same side again
            although the sides were swapped. Honest raters of two equal videos reverse half of them.
        least_checks: a rule applies from so many checks of its kind on.
    """

    most_gold_failed: float = 0.25
    most_identical_different: float = 0.5
    most_repeats_reversed: float = 0.75
    least_checks: int = 3

    def __post_init__(self) -> None:
        """Refuse shares outside 0 to 1."""
        for name in ("most_gold_failed", "most_identical_different", "most_repeats_reversed"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share:g}; choose a share from 0 to 1")
        if self.least_checks < 1:
            raise ValueError(f"least_checks is {self.least_checks}; choose 1 or more")


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A rater who is left out, and why."""

    rater_id: str
    reasons: tuple[str, ...]


def exclusions(votes: Iterable[Vote], rules: ScreeningRules) -> list[Exclusion]:
    """Return the raters who break a rule, in the order of their ids."""
    by_rater: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater_id].append(vote)
    found = []
    for rater, given in sorted(by_rater.items()):
        reasons = tuple(_reasons(given, rules))
        if reasons:
            found.append(Exclusion(rater, reasons))
    return found


def _reasons(votes: Sequence[Vote], rules: ScreeningRules) -> Iterable[str]:
    failed, gold = _judged(votes, PairKind.GOLD)
    different, same = _judged(votes, PairKind.IDENTICAL)
    repeats = repeat_consistency(votes)
    checks = (
        ("failed", failed, gold, "gold pairs", rules.most_gold_failed),
        ("judged different", different, same, "identical pairs", rules.most_identical_different),
        ("reversed", repeats.reversed, repeats.repeats, "repeats", rules.most_repeats_reversed),
    )
    for verb, count, total, what, most in checks:
        if total >= rules.least_checks and count > most * total:
            yield f"{verb} {count} of {total} {what}; at most {100 * most:g} % are allowed"


def _judged(votes: Iterable[Vote], kind: PairKind) -> tuple[int, int]:
    """Return how many pairs of a kind of checks a rater got wrong, and how many there were."""
    pairs: dict[str, list[Outcome]] = defaultdict(list)
    for vote in votes:
        if vote.kind is kind and not vote.is_repeat:
            pairs[vote.pair_id].append(vote.outcome)
    wrong = _gold_failed if kind is PairKind.GOLD else _identical_different
    return sum(wrong(outcomes) for outcomes in pairs.values()), len(pairs)


def _gold_failed(outcomes: Sequence[Outcome]) -> bool:
    return outcomes.count(Outcome.WIN) <= outcomes.count(Outcome.LOSS)


def _identical_different(outcomes: Sequence[Outcome]) -> bool:
    return 2 * outcomes.count(Outcome.TIE) < len(outcomes)
