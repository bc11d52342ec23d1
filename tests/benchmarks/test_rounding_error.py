"""The curves of docs/numerics.md's picture are what a hand computes."""

import numpy as np
import pytest

from benchmarks.quality.rounding_error import relative_error
from quant.studies.methods.formats import BF16, E4M3, E5M2, HIF8, INT8, Format


def uniform_octave(mantissa_bits: int) -> float:
    """Return the RMS relative error of values spread evenly in log2 over one binade.

    The step is 2**-mantissa_bits of the binade's lower end, and an error is evenly within half a
    step: the mean square is step**2 / 12 times the mean of x**-2, which is 3/8 / ln 2.
    """
    return float(np.sqrt(2.0 ** (-2 * mantissa_bits) / 12 * 0.375 / np.log(2)))


@pytest.mark.parametrize(
    ("number_format", "power", "mantissa_bits"),
    [
        (BF16, -20.5, 7),
        (BF16, 10.5, 7),
        # amax 1 becomes 8, so 2**-n is 2**(3 - n): three bits down to 2**-3, two to 2**-7.
        (HIF8, 0.5, 3),
        (HIF8, -5.5, 3),
        (HIF8, -6.5, 2),
        (HIF8, -9.5, 2),
        (HIF8, -10.5, 1),
        (HIF8, 3.5, 2),
        (HIF8, 7.5, 1),
        # Amax becomes 448 and 57,344, which are 1.75 times a power of two.
        (E4M3, -10.5 - np.log2(1.75), 3),
        (E5M2, -20.5 - np.log2(1.75), 2),
    ],
    ids=str,
)
def test_an_octave_has_the_error_of_its_mantissa(
    number_format: Format, power: float, mantissa_bits: int
) -> None:
    (error,) = relative_error(number_format, np.array([2.0**power]))
    assert error == pytest.approx(uniform_octave(mantissa_bits), rel=0.06)


def test_int8_has_one_step_for_all_magnitudes() -> None:
    (large, small) = relative_error(INT8, 2.0 ** np.array([-1.5, -4.5]))
    assert small / large == pytest.approx(8, rel=0.1)


def test_what_is_out_of_range_is_lost() -> None:
    for number_format, power in ((HIF8, -28), (E4M3, -20), (INT8, -10)):
        (error,) = relative_error(number_format, np.array([2.0**power]))
        assert error == pytest.approx(1)
    # Saturation: what is 2**10 times too large loses all but 2**-10 of itself.
    (error,) = relative_error(E4M3, np.array([2.0**10]))
    assert error == pytest.approx(1 - 2.0**-10, abs=1e-3)
