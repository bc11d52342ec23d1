"""Say how sure a study is: intervals, tests and the effect it could have seen.

Measurements on points of one prompt are not independent. So the unit that is drawn anew is the
prompt: intervals are bootstrapped over prompts, and tests take each prompt's mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quant.errors import StudyError

Floats = NDArray[np.float64]

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, with its interval.

    Attributes:
        low, high: bounds of the 95 % interval, from a bootstrap over prompts.
        median: of the prompts' means.
        prompts, values: how many there are.
    """

    mean: float
    low: float
    high: float
    median: float
    prompts: int
    values: int


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """A paired difference a − b, with its tests.

    Attributes:
        sign_p: two-sided exact sign test over prompts; a prompt without a difference is left out.
        permutation_p: two-sided sign-flip test of the mean over prompts.
        detectable: the smallest true difference that this many prompts show with power 0.8.
    """

    sign_p: float
    permutation_p: float
    detectable: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def prompt_means(values: Sequence[float], prompts: Sequence[str]) -> dict[str, float]:
    """Return each prompt's mean, in the order of first appearance.

    Raises:
        StudyError: the two differ in length, there are none, or a value is not finite.
    """
    if len(values) != len(prompts) or not values:
        raise StudyError(f"{len(values)} values of {len(prompts)} prompts cannot be averaged")
    if not np.isfinite(values).all():
        number = int((~np.isfinite(values)).argmax())
        raise StudyError(f"value {number} of prompt {prompts[number]!r} is {values[number]}")
    found: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        found.setdefault(prompt, []).append(value)
    return {prompt: float(np.mean(each)) for prompt, each in found.items()}


def estimate(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> Estimate:
    """Estimate the mean of values that belong to prompts.

    Raises:
        StudyError: there are fewer than two prompts, or a value is not finite.
    """
    means = np.array(list(prompt_means(values, prompts).values()))
    low, high = _interval(means, seed)
    return Estimate(
        float(means.mean()), low, high, float(np.median(means)), len(means), len(values)
    )


def paired_difference(
    a: Sequence[float], b: Sequence[float], prompts: Sequence[str], seed: int = 0
) -> Difference:
    """Estimate a − b, measured on the same points of the same prompts.

    Raises:
        StudyError: the lengths differ, there are fewer than two prompts, or a value is not finite.
    """
    if len(a) != len(b):
        raise StudyError(f"{len(a)} values cannot be paired with {len(b)}")
    values = (np.asarray(a, float) - np.asarray(b, float)).tolist()
    means = np.array(list(prompt_means(values, prompts).values()))
    low, high = _interval(means, seed)
    return Difference(
        float(means.mean()),
        low,
        high,
        float(np.median(means)),
        len(means),
        len(values),
        sign_p=sign_test(means),
        permutation_p=sign_flip_test(means, seed),
        detectable=detectable_difference(means),
    )


def sign_test(differences: Floats) -> float:
    """Return the two-sided p of an exact sign test; 1 if no difference is left."""
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    if above + below == 0:
        return 1.0
    return float(stats.binomtest(above, above + below).pvalue)


def sign_flip_test(differences: Floats, seed: int = 0, draws: int = DRAWS) -> float:
    """Return the two-sided p of the mean under random signs: exact for up to 13 differences."""
    found = abs(differences.mean())
    count = len(differences)
    if count <= 13:
        every = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        means = np.abs((1.0 - 2 * every) @ differences) / count
        return float((means >= found * (1 - 1e-12)).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (draws, count), dtype=np.int8) * 2.0 - 1
    means = np.abs(signs @ differences) / count
    return float((1 + (means >= found * (1 - 1e-12)).sum()) / (draws + 1))


def detectable_difference(differences: Floats, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest true mean that a two-sided t test shows with this power."""
    count = len(differences)
    needed = stats.t.ppf(1 - alpha / 2, count - 1) + stats.t.ppf(power, count - 1)
    return float(needed * differences.std(ddof=1) / np.sqrt(count))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p values that several tests may be read by (Holm 1979), in the given order."""
    ordered = sorted(p_values, key=p_values.__getitem__)
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def percentile_of(value: float, others: Sequence[float]) -> float:
    """Return the percentage of `others` below a value; equal ones count half."""
    array = np.asarray(others, float)
    return float(100 * ((array < value).mean() + (array == value).mean() / 2))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's correlation and its two-sided p."""
    result = stats.spearmanr(a, b)
    return float(result.statistic), float(result.pvalue)


def _interval(means: Floats, seed: int) -> tuple[float, float]:
    """Bootstrap the mean: percentiles of the means of prompts drawn with replacement."""
    if len(means) < 2:
        raise StudyError("an interval needs at least two prompts, and there is one: give more")
    rng = np.random.default_rng(seed)
    drawn = np.empty(DRAWS)
    for start in range(0, DRAWS, 1000):  # a thousand at a time, to keep memory small
        index = rng.integers(0, len(means), (1000, len(means)))
        drawn[start : start + 1000] = means[index].mean(1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(low), float(high)
