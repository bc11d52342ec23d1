"""Verdicts follow the interval, and the votes needed are those of the exact test."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from service.comparisons.statistics.intervals import ClusteredShare
from service.comparisons.statistics.noninferiority import (
    Bounds,
    Verdict,
    decisive_votes_needed,
    judge,
    votes_needed,
)


def share_of(value: float, effective: float, design_effect: float = 1.0) -> ClusteredShare:
    votes = round(effective * design_effect)
    return ClusteredShare(value, votes, 20, 40, effective, design_effect, df=1e6)


@pytest.mark.parametrize(
    ("value", "effective", "expected"),
    [
        (0.50, 1000, Verdict.NON_INFERIOR),
        (0.43, 1000, Verdict.NON_INFERIOR),
        (0.42, 1000, Verdict.INCONCLUSIVE),
        (0.38, 1000, Verdict.INCONCLUSIVE),
        (0.37, 1000, Verdict.INFERIOR),
        (0.50, 60, Verdict.INCONCLUSIVE),
    ],
)
def test_the_interval_decides(value: float, effective: float, expected: Verdict) -> None:
    verdict, interval = judge(share_of(value, effective), Bounds(margin=0.1))
    assert verdict is expected
    assert interval is not None
    assert interval.level == pytest.approx(0.9)


def test_without_an_interval_nothing_is_shown() -> None:
    assert judge(None, Bounds(margin=0.1)) == (Verdict.INCONCLUSIVE, None)


@pytest.mark.parametrize(("margin", "votes"), [(0.05, 647), (0.10, 164), (0.15, 77)])
def test_the_votes_needed_were_also_found_elsewhere(margin: float, votes: int) -> None:
    """The figures were computed with scipy before this module was written."""
    assert decisive_votes_needed(Bounds(margin)) == votes


@pytest.mark.parametrize("margin", [0.04, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("alpha", [0.025, 0.05])
@pytest.mark.parametrize("true_share", [0.48, 0.5, 0.55])
def test_from_the_votes_needed_on_the_test_has_the_power(
    margin: float, alpha: float, true_share: float
) -> None:
    bounds = Bounds(margin, alpha=alpha, power=0.8, true_share=true_share)
    needed = decisive_votes_needed(bounds)

    votes = np.arange(max(needed - 1, 1), 2 * needed)
    fewest = stats.binom.ppf(1 - alpha, votes, bounds.limit) + 1
    power = stats.binom.sf(fewest - 1, votes, true_share)
    assert (power[votes >= needed] >= 0.8).all()
    assert (power[votes < needed] < 0.8).all()


def test_the_documented_votes_needed_are_those_computed() -> None:
    text = (Path(__file__).resolve().parents[4] / "docs" / "comparisons.md").read_text()
    rows = re.findall(r"^\| (0\.\d+) \| ([\d,]+(?: \| [\d,]+){5}) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for margin, cells in rows:
        bounds = Bounds(float(margin))
        plain = decisive_votes_needed(bounds)
        assert [int(cell.replace(",", "")) for cell in cells.split(" | ")] == [
            plain,
            decisive_votes_needed(replace(bounds, power=0.9)),
            decisive_votes_needed(replace(bounds, true_share=0.48)),
            decisive_votes_needed(bounds, tie_share=0.3),
            2 * plain,
            4 * plain,
        ]


def test_ties_that_count_as_half_need_fewer_decisive_votes() -> None:
    # With half of the votes tied, a margin of 10 points is one of 20 among the decisive ones.
    halved = decisive_votes_needed(Bounds(0.1), tie_share=0.5)
    assert halved == decisive_votes_needed(Bounds(0.2))
    assert decisive_votes_needed(Bounds(0.1), tie_share=1.0) < 10


def test_clustering_multiplies_the_votes_needed() -> None:
    needed = votes_needed(share_of(0.5, 60, design_effect=2.0), 120, 0.0, Bounds(0.1))
    assert (needed.independent, needed.clustered, needed.missing) == (164, 328, 208)


def test_once_the_verdict_is_made_no_vote_is_missing() -> None:
    assert votes_needed(share_of(0.7, 60), 60, 0.0, Bounds(0.1)).missing == 0


def test_before_the_first_vote_all_are_missing() -> None:
    needed = votes_needed(None, 0, 0.0, Bounds(0.1))
    assert (needed.design_effect, needed.missing) == (1.0, 164)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margin": 0.0}, "margin is 0; choose one from 0.01 to 0.49"),
        ({"margin": 0.1, "alpha": 0.5}, "alpha is 0.5; choose one from 0.001 to 0.2"),
        ({"margin": 0.1, "power": 1.0}, "power is 1; choose one from 0.5 to 0.99"),
        ({"margin": 0.1, "true_share": 0.4}, "true_share is 0.4; choose one from 0.41 to 0.99"),
    ],
)
def test_bounds_that_no_verdict_can_be_made_from(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Bounds(**values)
