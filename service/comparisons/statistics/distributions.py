"""Compute the normal, Student and binomial distributions without scipy.

scipy and numpy are 216 MB installed and take two seconds to import; a report needs five functions
of them. Tests compare these with scipy's.
"""

import math
from statistics import NormalDist

TINY = 1e-300
EPSILON = 1e-15
MAX_TERMS = 10_000


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The continued fraction converges fast below the mean only; above it, the mirrored one does.
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(x, a, b) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function by Lentz's method."""
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for term in (even, odd):
            d = 1.0 / _not_zero(1.0 + term * d)
            c = _not_zero(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < EPSILON:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY


def student_quantile(probability: float, df: float) -> float:
    """Return the quantile of Student's t distribution; `df` need not be whole."""
    if probability < 0.5:
        return -student_quantile(1.0 - probability, df)
    tails = 2.0 * (1.0 - probability)
    low, high = 0.0, 2.0
    while student_tails(high, df) > tails:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        if student_tails(middle, df) > tails:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def student_tails(t: float, df: float) -> float:
    """Return the probability that Student's t is as far from 0 as `t`, on either side."""
    return beta_cdf(df / (df + t * t), df / 2.0, 0.5)


def binomial_pmf(successes: int, trials: int, probability: float) -> float:
    """Return the probability of exactly so many successes; `probability` is inside (0, 1)."""
    return math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        + successes * math.log(probability)
        + (trials - successes) * math.log1p(-probability)
    )


def binomial_upper_tail(successes: int, trials: int, probability: float) -> float:
    """Return the probability of at least so many successes."""
    if successes <= 0:
        return 1.0
    if successes > trials:
        return 0.0
    return beta_cdf(probability, successes, trials - successes + 1)
