"""Choose scales from the statistics of a tensor.

`scale` is always the dequantization multiplier, x ≈ decode(qdata) * scale. The default policy
`pow2` chooses the power of two that brings amax into [8, 16), the top of the range in which
HiFloat8 has 3 mantissa bits. Multiplying by a power of two is exact in BF16, so scaling gives the
same bits on every device, and the scale can be folded into other operations. Its exponent is
clamped to ±MAX_SCALE_EXPONENT, so amax lands in [8, 16) only if it is in [2**-61, 2**68). The
values of larger tensors lose mantissa bits and then saturate. Those of smaller tensors lose
mantissa bits and then become zero.

The policy `sqnr` chooses the power of two with the least error on a histogram of binades. Outliers
above 16 then have fewer bits if this reduces the error. The other policies reproduce other HiFloat8
code. `amax127` is that of INT8.

This module chooses scales; `quant.kernels` applies them. The statistics come from
`quant.calibration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quant.errors import RecipeError

# Scales stay well within FP32, so neither a scale nor its reciprocal can overflow or be subnormal.
MAX_SCALE_EXPONENT = 64
# Binade histograms count |x| by floor(log2|x|), one bin per exponent.
FIRST_BINADE = -40
NUM_BINADES = 64
EXPONENTS = 256  # values of the exponent field of FP32 and BF16
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """A rule to choose scales.

    Attributes:
        name: its name in recipes.
        qmax: the value that amax is mapped to; None if the policy does not use amax.
        power_of_two: the scale is a power of two. If the policy uses amax, it is the smallest one
            greater than amax / qmax, so that amax lands in [qmax/2, qmax).
        needs_binades: the policy needs a histogram, so it cannot choose scales at run time.
        summary: a description in one line, for people.
        format: the number format that it chooses scales for.
    """

    name: str
    qmax: float | None
    power_of_two: bool
    needs_binades: bool
    summary: str
    format: str = "hif8"


POLICIES = {
    policy.name: policy
    for policy in (
        ScalePolicy("pow2", 16.0, True, False, "power of two, amax in [8, 16)"),
        ScalePolicy("sqnr", None, True, True, "the power of two that loses least"),
        ScalePolicy("amax15", 15.0, False, False, "amax at 15 (MindSpeed, forward)"),
        ScalePolicy("amax224", 224.0, False, False, "amax at 224 (MindSpeed, gradients)"),
        ScalePolicy("none", None, True, False, "no scale: values are cast as they are"),
        ScalePolicy("amax127", 127.0, False, False, "amax at 127, INT8's largest", "int8"),
    )
}


def scale_policy(name: str) -> ScalePolicy:
    """Return the policy with this name.

    Raises:
        RecipeError: there is none with this name.
    """
    if name not in POLICIES:
        raise RecipeError(f"scale policy {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name]


def choose_scale(policy: ScalePolicy, amax: Tensor, binades: Tensor | None = None) -> Tensor:
    """Choose scales by a policy: amax [...] → scale [...] float32.

    Where amax is 0 or not finite, the scale is 1. Powers of two stay within
    2**±MAX_SCALE_EXPONENT.

    Args:
        binades: histogram of the same values, [..., NUM_BINADES]; needed by `sqnr` only.
    """
    amax = amax.float()
    if policy.needs_binades:
        assert binades is not None, f"policy {policy.name} needs a histogram of binades"
        scale = torch.ldexp(torch.ones_like(amax), best_exponent(binades))
    elif policy.qmax is None:
        return torch.ones_like(amax)
    elif policy.power_of_two:
        _, exponent = torch.frexp(amax / policy.qmax)  # in [1/2, 1) times 2**exponent
        exponent = exponent.clamp(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT)
        scale = torch.ldexp(torch.ones_like(amax), exponent)
    else:
        scale = amax / policy.qmax
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def is_power_of_two(scale: float) -> bool:
    """Return whether a positive scale is a power of two, so that multiplying by it is exact."""
    return math.frexp(scale)[0] == 0.5


def binade_histogram(x: Tensor) -> Tensor:
    """Count |x| per binade and row: x [R, C] → [R, NUM_BINADES] float32.

    Zeros, FP32 subnormals, infinities and NaNs are not counted. Other values outside the bins are
    counted in the first or last bin.
    """
    rows = x.shape[0]
    row_start = torch.arange(rows, dtype=torch.int32, device=x.device).unsqueeze(-1) * EXPONENTS
    counts = torch.zeros(rows * EXPONENTS, dtype=torch.float32, device=x.device)
    for chunk in torch.split(x, max(1, _CHUNK // rows), dim=1):
        exponent_field = chunk.float().contiguous().view(torch.int32) >> 23 & 0xFF
        index = (row_start + exponent_field).reshape(-1)
        counts += torch.bincount(index, minlength=rows * EXPONENTS)
    return fold_exponents(counts.view(rows, EXPONENTS))


def amax_and_exponents(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude and the counts of exponents of a flat tensor.

    A tensor of numbers is read as integers: without the sign, they are in the order of magnitudes,
    infinity is above all numbers and NaN above infinity.

    Args:
        x: [C] BF16 or another floating type, which is taken as FP32.

    Returns:
        [] float32, NaN if there is one; and [EXPONENTS] int64, by the field of the exponent.
    """
    if x.numel() > _CHUNK:
        parts = [amax_and_exponents(chunk) for chunk in torch.split(x, _CHUNK)]
        amax, counts = (torch.stack(each) for each in zip(*parts, strict=True))
        return amax.max(), counts.sum(0)
    if x.dtype == torch.bfloat16:
        magnitudes, mantissa_bits = x.view(torch.int16) & 0x7FFF, 7
    else:
        x = x.float()
        magnitudes, mantissa_bits = x.view(torch.int32) & 0x7FFFFFFF, 23
    amax = magnitudes.max().view(x.dtype).float()
    fields = magnitudes.bitwise_right_shift_(mantissa_bits)
    return amax, torch.bincount(fields, minlength=EXPONENTS)


def fold_exponents(counts: Tensor) -> Tensor:
    """Turn counts by the field of the exponent into binades: [..., EXPONENTS] → [..., NUM_BINADES].

    The result is float32. Values outside the bins are in the first or last one.
    """
    first = FIRST_BINADE + 127
    last = first + NUM_BINADES - 1
    binades = counts[..., first : last + 1].clone()
    binades[..., 0] += counts[..., 1:first].sum(-1)
    binades[..., -1] += counts[..., last + 1 : 255].sum(-1)
    return binades.float()


def best_exponent(binades: Tensor) -> Tensor:
    """Return the exponent of the power-of-two scale with the least squared rounding error.

    Values are assumed to be uniformly distributed within each binade. Many scales have nearly equal
    errors. Of these the one closest to the `pow2` rule is chosen, so that the result does not
    depend on the last bits of the sums.

    Args:
        binades: [..., NUM_BINADES] counts → [...] int32.
    """
    error, signal = (table.to(binades.device) for table in _binade_error())
    counts = binades.double()
    exponents = torch.arange(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT + 1, device=binades.device)
    relative = (counts @ error) / (counts @ signal).clamp(min=1e-300).unsqueeze(-1)
    bins = torch.arange(NUM_BINADES, device=binades.device)
    top = FIRST_BINADE + torch.where(binades > 0, bins, -1).amax(-1)
    distance = (exponents - (top - 3).unsqueeze(-1)).abs()
    return exponents[(relative * (1 + 1e-6 * distance)).argmin(-1)].int()


@lru_cache(maxsize=1)
def _binade_error() -> tuple[Tensor, Tensor]:
    """Return mean squared errors per value [NUM_BINADES, scales] and mean squares [NUM_BINADES]."""
    binade = torch.arange(FIRST_BINADE, FIRST_BINADE + NUM_BINADES, dtype=torch.float64)
    exponents = torch.arange(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT + 1, dtype=torch.float64)
    scaled = binade[:, None] - exponents  # the binade after scaling, [NUM_BINADES, scales]
    distance = scaled.abs()
    bits = 3 - (distance >= 4).double() - (distance >= 8).double() - (distance >= 16).double()
    error = (2.0 ** (scaled - bits)).square() / 12
    square = 7 / 3 * (2.0**scaled).square()  # mean of x² over one binade
    error = torch.where(scaled < -23, square, error)
    # [2**-23, 2**-22) is rounded up to 2**-22, and values beyond 2**15 become 2**15. The second
    # moment around a point p of a uniform distribution over [a, 2a) is 7/3·a² − 3·a·p + p².
    for condition, point in ((scaled == -23, 2.0**-22), (scaled >= 15, 2.0**15)):
        error = torch.where(condition, square - 3 * 2.0**scaled * point + point**2, error)
    return error * (2.0**exponents).square(), 7 / 3 * (2.0**binade).square()
