"""The distributions are scipy's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from service.comparisons.statistics.distributions import (
    beta_cdf,
    binomial_pmf,
    binomial_upper_tail,
    normal_quantile,
    student_quantile,
    student_tails,
)

shape = st.floats(0.5, 500)
inside = st.floats(0.001, 0.999)

ORACLE = settings(deadline=None)  # the first call of an oracle may be slow


@ORACLE
@given(inside, shape, shape)
def test_beta(x: float, a: float, b: float) -> None:
    assert beta_cdf(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_beta_at_its_ends(x: float, expected: float) -> None:
    assert beta_cdf(x, 2, 3) == expected


@ORACLE
@given(inside, st.floats(1, 1000))
def test_student(probability: float, df: float) -> None:
    quantile = student_quantile(probability, df)
    assert quantile == pytest.approx(stats.t.ppf(probability, df), rel=1e-8, abs=1e-9)
    assert student_tails(quantile, df) == pytest.approx(2 * stats.t.sf(abs(quantile), df), rel=1e-8)


@ORACLE
@given(inside)
def test_normal(probability: float) -> None:
    assert normal_quantile(probability) == pytest.approx(stats.norm.ppf(probability), abs=1e-12)


@ORACLE
@given(st.integers(1, 2000), st.data(), inside)
def test_binomial(trials: int, data: st.DataObject, probability: float) -> None:
    successes = data.draw(st.integers(0, trials))
    pmf = stats.binom.pmf(successes, trials, probability)
    assert binomial_pmf(successes, trials, probability) == pytest.approx(pmf, rel=1e-8, abs=1e-200)
    tail = stats.binom.sf(successes - 1, trials, probability)
    assert binomial_upper_tail(successes, trials, probability) == pytest.approx(
        tail, rel=1e-7, abs=1e-12
    )


def test_more_successes_than_trials_are_impossible() -> None:
    assert binomial_upper_tail(6, 5, 0.5) == 0.0
