"""Agreement is that of the krippendorff package; bias and repeats are counted right."""

import random
from collections import defaultdict

import krippendorff
import numpy as np
import pytest
from scipy import stats

from service.comparisons.statistics.reliability import (
    RANK,
    Scale,
    krippendorff_alpha,
    repeat_consistency,
    side_bias,
    vote_agreement,
)
from service.comparisons.statistics.votes import Outcome, PairKind, Side, Vote
from tests.service.comparisons.statistics.generated import mirrored, votes_of


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("seed", range(10))
def test_alpha_is_that_of_krippendorff(seed: int, scale: Scale) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, 25)
    table = np.where(rng.random((6, 25)) < 0.6, truth, rng.integers(0, 4, (6, 25))).astype(float)
    table[rng.random(table.shape) < 0.3] = np.nan
    units = [[int(value) for value in column if not np.isnan(value)] for column in table.T]
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement=str(scale))
    assert krippendorff_alpha(units, scale) == pytest.approx(expected)


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("seed", range(5))
def test_the_agreement_of_votes_is_that_of_krippendorff(seed: int, scale: Scale) -> None:
    votes = votes_of(seed, criteria=("overall", "imaging_quality"))
    columns: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for vote in votes:
        columns[vote.pair_id, vote.criterion][vote.rater_id] = RANK[vote.outcome]
    raters = sorted({vote.rater_id for vote in votes})
    table = [[column.get(rater, np.nan) for column in columns.values()] for rater in raters]
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement=str(scale))
    assert vote_agreement(votes, scale) == pytest.approx(expected)
    assert vote_agreement(mirrored(votes), scale) == pytest.approx(expected)


def test_alpha_by_hand() -> None:
    # Two raters, four units, one disagreement: observed 2 of 8, expected 1 - (5*4 + 3*2) / (8*7).
    units = [[1, 1], [1, 1], [0, 0], [1, 0]]
    assert krippendorff_alpha(units, Scale.NOMINAL) == pytest.approx(1 - (2 / 8) / (30 / 56))


@pytest.mark.parametrize("units", [[], [[1], [0]], [[1, 1], [1, 1, 1]]])
def test_alpha_is_not_defined_without_pairs_or_differences(units: list[list[int]]) -> None:
    assert krippendorff_alpha(units, Scale.NOMINAL) is None
    assert krippendorff_alpha(units, Scale.ORDINAL) is None


def vote(outcome: Outcome, side: Side, number: int = 0, **other) -> Vote:
    return Vote("p", f"pair{number}", "r", "overall", outcome, side, **other)


def test_side_bias_counts_sides_and_not_modes() -> None:
    votes = [
        *(vote(Outcome.WIN, Side.LEFT, i) for i in range(6)),
        *(vote(Outcome.LOSS, Side.RIGHT, 10 + i) for i in range(3)),
        vote(Outcome.LOSS, Side.LEFT, 20),
        vote(Outcome.TIE, Side.LEFT, 21),
        vote(Outcome.WIN, Side.LEFT, 22, kind=PairKind.GOLD),
        vote(Outcome.WIN, Side.LEFT, 0, is_repeat=True),
    ]
    bias = side_bias(votes)
    assert (bias.left, bias.decisive, bias.candidate_left) == (9, 10, 7)
    assert bias.p_value == pytest.approx(stats.binomtest(9, 10).pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_side_bias_does_not_change_when_the_modes_are_exchanged(seed: int) -> None:
    votes = votes_of(seed, mean=0.5)
    before, after = side_bias(votes), side_bias(mirrored(votes))
    assert (before.left, before.decisive, before.p_value) == (
        after.left,
        after.decisive,
        after.p_value,
    )


def test_side_bias_without_votes() -> None:
    bias = side_bias([])
    assert (bias.decisive, bias.interval, bias.p_value) == (0, None, 1.0)


def test_repeats_are_compared_with_the_first_vote_in_any_order() -> None:
    votes = [
        vote(Outcome.WIN, Side.LEFT, 1),
        vote(Outcome.WIN, Side.RIGHT, 1, is_repeat=True),
        vote(Outcome.WIN, Side.LEFT, 2),
        vote(Outcome.LOSS, Side.RIGHT, 2, is_repeat=True),
        vote(Outcome.TIE, Side.LEFT, 3),
        vote(Outcome.LOSS, Side.RIGHT, 3, is_repeat=True),
        vote(Outcome.WIN, Side.RIGHT, 4, is_repeat=True),  # its first vote was withdrawn
    ]
    found = repeat_consistency(random.Random(0).sample(votes, len(votes)))
    assert (found.repeats, found.same, found.reversed) == (3, 1, 1)


def test_no_repeats() -> None:
    found = repeat_consistency([vote(Outcome.WIN, Side.LEFT)])
    assert (found.repeats, found.interval) == (0, None)
