"""Tests of difference agree with scipy and statsmodels."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from service.comparisons.statistics.significance import (
    EXACT_PROMPTS,
    binomial_test,
    holm,
    prompt_means,
    sign_flip_test,
)
from service.comparisons.statistics.votes import Score

ORACLE = settings(deadline=None)  # the first call of an oracle may be slow


@ORACLE
@given(st.integers(1, 600), st.data(), st.floats(0.05, 0.95))
def test_binomial_is_that_of_scipy(trials: int, data: st.DataObject, probability: float) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = stats.binomtest(successes, trials, probability).pvalue
    assert binomial_test(successes, trials, probability) == pytest.approx(expected, rel=1e-6)


def test_binomial_by_hand_and_without_votes() -> None:
    assert binomial_test(9, 10) == pytest.approx(22 / 1024)
    assert binomial_test(0, 0) == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_few_prompts_are_flipped_in_every_way_as_by_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = rng.choice([-0.5, -0.25, 0.0, 0.1, 0.25, 0.5], 9)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_test(list(differences), 0) == pytest.approx(expected)


def test_many_prompts_are_flipped_at_random_as_by_scipy() -> None:
    rng = np.random.default_rng(5)
    differences = rng.normal(0.05, 0.2, 40)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
    ).pvalue
    assert sign_flip_test(list(differences), 0) == pytest.approx(expected, abs=0.02)


def test_the_drawn_p_value_is_near_the_exact_one() -> None:
    values = [0.1 * (i % 5) - 0.1 for i in range(EXACT_PROMPTS + 3)]
    values = [value or 0.05 for value in values]
    sums = [0.0]
    for value in values:
        sums = [total + sign for total in sums for sign in (value, -value)]
    exact = sum(abs(total) >= abs(sum(values)) - 1e-9 for total in sums) / len(sums)
    assert sign_flip_test(values, 7) == pytest.approx(exact, abs=0.02)


def test_sign_flip_by_hand() -> None:
    # Five prompts that all lean one way: 2 of 32 patterns are as extreme.
    assert sign_flip_test([0.1, 0.2, 0.3, 0.1, 0.5], 0) == 2 / 32


@pytest.mark.parametrize("differences", [[], [0.0], [0.0] * 30])
def test_without_a_difference_the_p_value_is_1(differences: list[float]) -> None:
    assert sign_flip_test(differences, 0) == 1.0


def test_the_drawn_p_value_follows_its_seed_and_not_the_sign() -> None:
    values = [random.Random(1).gauss(0.1, 0.4) for _ in range(3)] * 10
    assert sign_flip_test(values, 3) == sign_flip_test(values, 3)
    assert sign_flip_test([-value for value in values], 3) == sign_flip_test(values, 3)


def test_prompt_means() -> None:
    given_scores = [Score("a", "p1", 1.0), Score("b", "p1", 0.5), Score("a", "p0", 0.0)]
    assert prompt_means(given_scores) == {"p0": 0.0, "p1": 0.75}


@settings(max_examples=10, deadline=None)  # statsmodels takes 0.2 s for each
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    adjusted = holm({str(index): p_value for index, p_value in enumerate(p_values)})
    expected = multipletests(p_values, method="holm")[1]
    assert list(adjusted.values()) == pytest.approx(list(expected), abs=1e-12)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06}
    )
    assert holm({}) == {}
