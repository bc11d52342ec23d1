"""Round to HiFloat8's grid by the bits of floating-point numbers, in Triton, for every chip.

A shift by an amount that differs between elements is one instruction on a GPU. The vector unit of
an Ascend 910B has none: its compiler turns such a shift into a loop over single elements. This form
gets the size of a rounding step from the exponent field of a small float instead, so that every
operation is a vector instruction there. Of 16-bit numbers twice as many fit into an instruction as
of 32-bit ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_bits(bits, scale_bits, MANTISSA: tl.constexpr):
    """Round numbers to HiFloat8's grid times a scale, half away from zero.

    Magnitudes beyond 32768 times the scale saturate to it, NaN stays NaN, and zero has no sign, as
    in `quant.numerics.reference.fake_quantize`.

    Args:
        bits: the numbers' bits: of BF16 as int16, or of float32 as int32.
        scale_bits: the bits of the scale in the same format. It is a power of two, from 2**-64 to
            2**64.
        MANTISSA: 7 for BF16, 23 for float32.
    """
    INT: tl.constexpr = bits.dtype
    # A float of the same width; of BF16's width, the chip computes in FP16 only.
    FLOAT: tl.constexpr = tl.float16 if MANTISSA == 7 else tl.float32
    EXPONENT: tl.constexpr = 0x7C00 if MANTISSA == 7 else 0x7F800000
    TWO: tl.constexpr = 0x4000 if MANTISSA == 7 else 0x40000000
    # From this number to its double, FLOAT's last bit is worth 2**(5 - MANTISSA).
    LARGE: tl.constexpr = 256.0 if MANTISSA == 7 else 32.0
    LARGE_BITS: tl.constexpr = 0x5C00 if MANTISSA == 7 else 0x42000000
    BINADE: tl.constexpr = 1 << MANTISSA
    INFINITY: tl.constexpr = 255 * BINADE

    magnitude = bits & (INFINITY | (BINADE - 1))
    sign = bits - magnitude
    all_ones_if_nan = ~((magnitude - (INFINITY + 1)) >> (MANTISSA + 8))
    magnitude = tl.minimum(magnitude, (scale_bits + 15 * BINADE).to(INT))
    # How many binades a number is from the scale, rounded down to 2, 4, 8 or 16: the exponent field
    # of that distance as a float. The field has no sign, so neither need the distance.
    distance = ((magnitude >> MANTISSA) - (scale_bits >> MANTISSA).to(INT)).to(FLOAT)
    power = tl.maximum(distance.to(INT, bitcast=True) & EXPONENT, tl.full((), TWO, INT))
    # Half a rounding step is that power of two times 2**(MANTISSA - 5): 3 mantissa bits are kept up
    # to three binades away, 2 up to seven, 1 up to fifteen, then 0. Adding LARGE moves the power
    # into the last bits: a multiplication and a conversion to integers in one.
    half = (power.to(FLOAT, bitcast=True) + LARGE).to(INT, bitcast=True) - LARGE_BITS
    rounded = (magnitude + half) & (half * -2)
    # From 2**-23 on, numbers are rounded up to the smallest subnormal; below, down to zero.
    rounded = tl.maximum(rounded, (scale_bits - 22 * BINADE).to(INT)) | sign
    least = (scale_bits - 23 * BINADE).to(INT).to(FLOAT, bitcast=True)
    return tl.where(magnitude.to(FLOAT, bitcast=True) < least, 0, rounded) | all_ones_if_nan
