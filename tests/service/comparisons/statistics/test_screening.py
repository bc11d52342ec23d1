"""Raters are left out for failed checks, and for nothing else."""

import re

import pytest

from service.comparisons.statistics.screening import ScreeningRules, exclusions
from service.comparisons.statistics.votes import Outcome, PairKind, Side, Vote

RULES = ScreeningRules(least_checks=4)


def checks(rater: str, kind: PairKind, outcomes: list[Outcome], criterion: str = "overall"):
    return [
        Vote("p", f"{kind}{index}", rater, criterion, outcome, Side.LEFT, kind=kind)
        for index, outcome in enumerate(outcomes)
    ]


def repeats(rater: str, outcomes: list[Outcome]) -> list[Vote]:
    """Return wins, each with a repeat of the given outcome."""
    return [
        Vote("p", f"x{index}", rater, "overall", each, side, is_repeat=is_repeat)
        for index, outcome in enumerate(outcomes)
        for each, side, is_repeat in (
            (Outcome.WIN, Side.LEFT, False),
            (outcome, Side.RIGHT, True),
        )
    ]


WIN, TIE, LOSS = Outcome.WIN, Outcome.TIE, Outcome.LOSS


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        (
            checks("r", PairKind.GOLD, [WIN, LOSS, TIE, WIN]),
            "failed 2 of 4 gold pairs; at most 25 % are allowed",
        ),
        (
            checks("r", PairKind.IDENTICAL, [WIN, LOSS, LOSS, TIE]),
            "judged different 3 of 4 identical pairs; at most 50 % are allowed",
        ),
        (
            repeats("r", [LOSS] * 4),
            "reversed 4 of 4 repeats; at most 75 % are allowed",
        ),
    ],
    ids=["gold", "identical", "repeats"],
)
def test_a_rater_who_breaks_a_rule_is_left_out(votes: list[Vote], reason: str) -> None:
    found = exclusions(votes, RULES)
    assert [(each.rater_id, each.reasons) for each in found] == [("r", (reason,))]


@pytest.mark.parametrize(
    "votes",
    [
        checks("r", PairKind.GOLD, [WIN, LOSS, WIN, WIN]),
        checks("r", PairKind.GOLD, [LOSS] * 3),
        checks("r", PairKind.IDENTICAL, [WIN, LOSS, TIE, TIE]),
        repeats("r", [LOSS, LOSS, LOSS, WIN]),
        repeats("r", [TIE] * 4),
        checks("r", PairKind.TEST, [LOSS] * 20),
        [],
    ],
    ids=["at most", "too few", "identical", "repeats", "unsure", "dislikes it", "no votes"],
)
def test_all_others_are_kept(votes: list[Vote]) -> None:
    assert exclusions(votes, RULES) == []


def test_a_check_is_judged_over_all_its_criteria() -> None:
    votes = [
        *checks("r", PairKind.GOLD, [WIN] * 4, "overall"),
        *checks("r", PairKind.GOLD, [WIN] * 4, "imaging_quality"),
        *checks("r", PairKind.GOLD, [LOSS] * 4, "motion_smoothness"),
    ]
    assert exclusions(votes, RULES) == []


def test_each_rater_is_judged_alone_and_all_reasons_are_given() -> None:
    votes = [
        *checks("b", PairKind.GOLD, [LOSS] * 4),
        *checks("b", PairKind.IDENTICAL, [WIN] * 4),
        *checks("a", PairKind.GOLD, [LOSS] * 4),
        *checks("c", PairKind.GOLD, [WIN] * 4),
    ]
    assert [(each.rater_id, len(each.reasons)) for each in exclusions(votes, RULES)] == [
        ("a", 1),
        ("b", 2),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"most_gold_failed": 2.0}, "most_gold_failed is 2; choose a share from 0 to 1"),
        ({"least_checks": 0}, "least_checks is 0; choose 1 or more"),
    ],
)
def test_rules_that_make_no_sense(values, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ScreeningRules(**values)
