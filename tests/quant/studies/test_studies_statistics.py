"""Test the studies' statistics against scipy and against what is known."""

import numpy as np
import pytest
from scipy import stats

from quant.errors import StudyError
from quant.studies import statistics

RNG = np.random.default_rng(5)


def test_an_interval_contains_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for number in range(200):
        rng = np.random.default_rng(number)
        effects = rng.normal(1.0, 1.0, 30).repeat(4) + rng.normal(0, 0.3, 120)
        prompts = [f"prompt {index // 4}" for index in range(120)]
        found = statistics.estimate(effects.tolist(), prompts)
        inside += found.low <= 1.0 <= found.high
        assert (found.prompts, found.values) == (30, 120)
    assert 0.88 <= inside / 200 <= 0.99


def test_values_of_one_prompt_count_once() -> None:
    few = statistics.estimate([1.0, 3.0], ["a", "b"])
    many = statistics.estimate([1.0] * 50 + [3.0] * 50, ["a"] * 50 + ["b"] * 50)
    assert (few.mean, few.low, few.high) == (many.mean, many.low, many.high)


def test_tests_equal_scipys() -> None:
    differences = RNG.normal(0.3, 1, 12)
    above = int((differences > 0).sum())
    assert statistics.sign_test(differences) == pytest.approx(stats.binomtest(above, 12).pvalue)
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert statistics.sign_flip_test(differences) == pytest.approx(exact.pvalue)
    many = RNG.normal(0.2, 1, 60)
    expected = stats.ttest_1samp(many, 0).pvalue
    assert statistics.sign_flip_test(many) == pytest.approx(expected, abs=0.02)


def test_the_detectable_difference_is_detected_with_its_power() -> None:
    noise = RNG.normal(0, 1, (4000, 25))
    effect = statistics.detectable_difference(noise[0] * 0 + RNG.normal(0, 1, 25))
    spread = RNG.normal(0, 1, 25)
    effect = statistics.detectable_difference(spread / spread.std(ddof=1))
    found = stats.ttest_1samp(noise + effect, 0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_holm_equals_the_published_procedure() -> None:
    found = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]


def test_a_paired_difference_knows_whether_it_is_real() -> None:
    base = RNG.normal(5, 3, 40)
    prompts = [str(number) for number in range(40)]
    real = statistics.paired_difference(
        (base + 0.5 + RNG.normal(0, 0.2, 40)).tolist(), base.tolist(), prompts
    )
    assert real.is_real
    assert real.low < 0.5 < real.high
    assert max(real.sign_p, real.permutation_p) < 0.001
    none = statistics.paired_difference(base.tolist(), base[::-1].tolist(), prompts)
    assert not none.is_real


def test_percentile_and_rank_correlation() -> None:
    assert statistics.percentile_of(3, [1, 2, 3, 4]) == 62.5
    assert statistics.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])[0] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("values", "prompts", "message"),
    [
        ([], [], "0 values of 0 prompts"),
        ([1.0], ["a", "b"], "1 values of 2 prompts"),
        ([1.0, float("nan")], ["a", "b"], "value 1 of prompt 'b' is nan"),
        ([1.0, 2.0], ["a", "a"], "at least two prompts"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    values: list[float], prompts: list[str], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        statistics.estimate(values, prompts)
