"""Round to HiFloat8 and decode it without look-ups and loops, by whole-tensor operations on bits.

Accelerators without a HiFloat8 unit read tables slowly and run some types on a slow processor. On
an Ascend 910B, CANN's operations add, multiply and clamp int16 tensors on the AI CPU. On the vector
cores they do it in float16 and bfloat16, and combine bits in int16. This module therefore keeps to
those: what would be integer arithmetic on BF16 bits is done on float16 numbers, exactly, because
none has more than 11 significant bits. A power-of-two scale is a shift of the exponent and costs
nothing. `docs/numerics.md` explains both algorithms.

Weights are decoded from ranks. A rank is the position of a value among all HiFloat8 values, counted
from zero and with the value's sign: -126..126. Between a few corners, the bits of a BF16 number are
linear in its rank.

Everything gives the same bits as `quant.numerics.reference`, on every device. What is not a power
of two within `MAX_SCALE_EXPONENT` is computed as there, by division and multiplication.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from quant.numerics import hif8, reference
from quant.numerics.scaling import MAX_SCALE_EXPONENT

CHUNK = 1 << 24
"""Values computed at a time, so that intermediate results do not fill the device's memory.

Counts of so many values are exact in float32."""

NO_RANK = -128
"""What `to_ranks` writes for NaN and infinity, which have no rank."""

_SIGN, _MAGNITUDE, _EXPONENT = -0x8000, 0x7FFF, 0x7F80  # of the bits of a BF16 number
_FP16_EXPONENT = 0x7C00
_UNIT = 128  # an exponent in the bits of a BF16 number
_BIAS = 127


def scale_exponent(scale: float) -> int | None:
    """Return the exponent of a power-of-two scale; None for a scale that no shift can apply."""
    mantissa, exponent = math.frexp(scale)
    exponent -= 1
    return exponent if mantissa == 0.5 and abs(exponent) <= MAX_SCALE_EXPONENT else None


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """Round x [...] bf16 to HiFloat8 under a scale: [...] bf16, as `reference.fake_quantize`."""
    exponent = scale_exponent(scale)
    if exponent is None:
        return reference.fake_quantize(x, torch.full((), scale, device=x.device))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunks = (torch.split(each.reshape(-1), CHUNK) for each in (x, out))
    for chunk, target in zip(*chunks, strict=True):
        _round(chunk, exponent, target)
    return out


def to_ranks(qdata: Tensor) -> Tensor:
    """Recode HiFloat8 codes as ranks: qdata [...] uint8 → [...] int8, NaN and infinity `NO_RANK`.

    This looks codes up in a table. It is meant to be done once, when weights are loaded.
    """
    table = _ranks().to(qdata.device)
    ranks = torch.empty(qdata.shape, dtype=torch.int8, device=qdata.device)
    chunks = (torch.split(each.reshape(-1), CHUNK) for each in (qdata, ranks))
    for chunk, target in zip(*chunks, strict=True):
        target.copy_(table.index_select(0, chunk.to(torch.int32)))
    return ranks


def dequantize_ranks(ranks: Tensor, scale: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Dequantize ranks under a scale: ranks [N, K] int8 → [N, K] bf16, as `reference.dequantize`.

    Args:
        scale: for the tensor, or [N, 1] float32 with one for each row.
        out: [N, K] bf16, contiguous, to write into.
    """
    if out is None:
        out = torch.empty(ranks.shape, dtype=torch.bfloat16, device=ranks.device)
    exponent = None if isinstance(scale, Tensor) else scale_exponent(scale)
    rows = max(1, CHUNK // ranks.shape[-1])
    for index, chunk in enumerate(torch.split(ranks, rows)):
        target = out[index * rows : (index + 1) * rows]
        if exponent is not None:
            _decode(chunk, exponent, target)
            continue
        _decode(chunk, 0, target)
        by_row = scale[index * rows : (index + 1) * rows] if isinstance(scale, Tensor) else scale
        target.copy_(target.float().mul_(by_row))
    return out


def misfits(x: Tensor, scale: float) -> Tensor:
    """Count the values of x [...] bf16 that saturate and those that become 0: [2] int64."""
    exponent = scale_exponent(scale)
    if exponent is None:
        return reference.misfits(x, torch.full((), scale, device=x.device))
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    for chunk in torch.split(x.reshape(-1), CHUNK):
        magnitude = chunk.abs()
        saturated = magnitude > hif8.LARGEST * scale
        flushed = (magnitude < hif8.FLUSHED_BELOW * scale) & (magnitude > 0)
        # In float32, because an integer sum of booleans takes 8 bytes for each.
        each = [mask.sum(dtype=torch.float32) for mask in (saturated, flushed)]
        counts += torch.stack(each).to(torch.int64)
    return counts


def _round(x: Tensor, exponent: int, out: Tensor) -> None:
    """Round x [n] bf16 to HiFloat8 times 2**exponent, into `out`: 20 operations, 88 bytes a value.

    A magnitude of binade e keeps 3, 2, 1 or 0 bits for a distance |e - exponent| up to 3, 7, 15 or
    more. Rounding half away from zero adds half of the last kept bit and clears the bits below it.
    A power of two has all that is needed: half the last kept bit is 2**e * p / 32, where p is
    the largest power of two that is not above the distance, and at least 2.
    """
    bits, rounded = x.view(torch.int16), out.view(torch.int16)
    magnitude_bits = bits & _MAGNITUDE
    magnitude = magnitude_bits.view(torch.bfloat16).clamp_(max=hif8.LARGEST * 2.0**exponent)
    binade = magnitude_bits & _EXPONENT
    # As numbers, the bits of a binade are 128 times its exponent, plus the bias.
    distance = binade.to(torch.float16).sub_(_UNIT * (_BIAS + exponent)).abs_().clamp_(2 * _UNIT)
    power = distance.view(torch.int16).bitwise_and_(_FP16_EXPONENT).view(torch.float16)
    kept = power.mul(-1 / 16).to(torch.int16)  # -16, -32, -64 or -128: clears 4, 5, 6 or 7 bits
    torch.addcmul(
        magnitude,
        binade.view(torch.bfloat16),
        power.to(torch.bfloat16),
        value=1 / (32 * _UNIT),
        out=out,
    )
    rounded.bitwise_and_(kept)
    # From half the smallest value on, values are rounded up to it, and those below become 0.
    out.clamp_(min=2.0 ** (exponent - 22))
    rounded.bitwise_or_(bits & _SIGN)
    out.masked_fill_(magnitude < hif8.FLUSHED_BELOW * 2.0**exponent, 0.0)
    out.masked_fill_(x.isnan(), float("nan"))


def _decode(ranks: Tensor, exponent: int, out: Tensor) -> None:
    """Write the values of ranks [...] times 2**exponent into `out`: 17 operations, 79 bytes each.

    With the rank, the bits of the BF16 number rise by 128 up to rank 8 (no mantissa bit, a rank is
    a binade), by 64 up to 24, by 32 up to 40, by 16 up to 96 (three mantissa bits), by 32 up to
    112, and by 64 above. Clamped ranks change the slope by their factor. The last of them, which is
    0 or 1, brings rank 1 to 2**-22 and leaves rank 0 at zero.
    """
    signed = ranks.to(torch.float16)
    rank = signed.abs()
    bits = torch.sub(rank, rank.clamp(max=112), alpha=0.5)
    bits.sub_(rank.clamp(40, 96), alpha=0.25)
    bits.add_(rank.clamp(max=24), alpha=0.5)
    bits.add_(rank.clamp(max=8))
    bits.add_(rank.clamp_(max=1), alpha=208 + 2 * exponent)
    bits.mul_(64).add_(640)
    sign = signed.view(torch.int16).bitwise_and_(_SIGN)
    torch.bitwise_or(bits.to(torch.int16), sign, out=out.view(torch.int16))


@lru_cache(maxsize=1)
def _ranks() -> Tensor:
    """Return the rank of every code: [256] int8 on the CPU. Do not write to it."""
    values = hif8.code_values()
    magnitudes = sorted({abs(value) for value in values.tolist() if math.isfinite(value)})
    ranks = [
        int(math.copysign(magnitudes.index(abs(value)), value)) if math.isfinite(value) else NO_RANK
        for value in values.tolist()
    ]
    return torch.tensor(ranks, dtype=torch.int8)
