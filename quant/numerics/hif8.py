"""Encode and decode HiFloat8, by integer arithmetic on float bits (arXiv 2409.16626).

A code is one byte: a sign, a "dot" prefix of varying length, a sign-magnitude exponent with an
implied leading one, and a mantissa in the remaining bits. Values near 1 have three mantissa bits,
values far from 1 fewer, down to none, so eight bits span 38 binades. `docs/numerics.md` lists all
256 codes.

`decode_code` states the layout of a single code in plain Python; everything else is vectorised.
Rounding is half away from zero. Values beyond ±32768, infinities included, saturate to ±32768, so
the encoder never writes the two codes that the format reserves for infinities. NaN stays NaN.
This module has no scales: see `quant.numerics.scaling` and `quant.numerics.reference`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 32768.0
"""The largest finite magnitude; larger ones saturate to it."""

FLUSHED_BELOW = 2.0**-23
"""Smaller magnitudes become zero; this one is rounded up to the smallest value, 2**-22."""

NAN_CODE = 0x80
INFINITY_CODE = 0x6F
SIGN_BIT = 0x80

# First positive code, dot value (exponent bits with sign), mantissa bits: the paper's table.
_NORMAL_ROWS = ((0x60, 4, 1), (0x40, 3, 2), (0x20, 2, 3), (0x10, 1, 3), (0x08, 0, 3))
_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP32_BIAS = 127
_MIN_TABLE_ELEMENTS = 1024  # from this size on, a table look-up is faster than the arithmetic
_FP32_INFINITY = 0x7F800000
_FP32_MAX_FINITE = (15 + _FP32_BIAS) << 23  # the bits of 32768.0
_FP32_MIN_SUBNORMAL = (-22 + _FP32_BIAS) << 23  # the bits of 2**-22


class CodeFields(NamedTuple):
    """The fields of a code: its row in the paper's table, its exponent, mantissa bits and value."""

    kind: str
    exponent: int | None
    mantissa_bits: int
    value: float


def decode_code(code: int) -> CodeFields:
    """Decode one code (0..255), field by field."""
    sign = -1.0 if code & SIGN_BIT else 1.0
    body = code & 0x7F
    if body == 0:
        kind, value = ("NaN", float("nan")) if code else ("zero", 0.0)
        return CodeFields(kind, None, 0, value)
    if body == INFINITY_CODE:
        return CodeFields("infinity", None, 0, sign * float("inf"))
    if body < 0x08:
        return CodeFields("subnormal", body - 23, 0, sign * 2.0 ** (body - 23))
    dot_width, mantissa_bits = next(row[1:] for row in _NORMAL_ROWS if body >= row[0])
    mantissa = body & ((1 << mantissa_bits) - 1)
    exponent = 0
    if dot_width:
        field = body >> mantissa_bits & ((1 << dot_width) - 1)
        leading_one = 1 << (dot_width - 1)  # implied; its position in the field holds the sign
        magnitude = leading_one | field & (leading_one - 1)
        exponent = -magnitude if field & leading_one else magnitude
    value = sign * 2.0**exponent * (1 + mantissa / (1 << mantissa_bits))
    return CodeFields(f"D{dot_width}", exponent, mantissa_bits, value)


def encode(x: Tensor) -> Tensor:
    """Round to the nearest HiFloat8 code: x [...] bf16, fp16 or fp32 → [...] uint8."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.numel() > _MIN_TABLE_ELEMENTS:
        return bf16_codes().index_select(0, bf16_index(x)).view(x.shape)
    return _encode_bits(x)


def decode(qdata: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode codes to values: qdata [...] uint8 → [...] dtype, exact in bf16, fp16 and fp32."""
    if qdata.dtype is not torch.uint8:
        raise TypeError(f"HiFloat8 codes are torch.uint8, not {qdata.dtype}")
    values = code_values().to(device=qdata.device, dtype=dtype)
    return values.index_select(0, qdata.reshape(-1).to(torch.int32)).view(qdata.shape)


def round_to_hif8(x: Tensor) -> Tensor:
    """Round to the nearest HiFloat8 value, as decode(encode(x)): x [...] → [...] in its dtype."""
    magnitude, negative = _rounded_magnitude(x)
    value = magnitude.view(torch.float32)
    return torch.where(negative & (magnitude > 0), -value, value).to(x.dtype)


@lru_cache(maxsize=1)
def code_values() -> Tensor:
    """Return the value of every code: [256] float32 on the CPU. Do not write to it."""
    return torch.tensor([decode_code(code).value for code in range(256)], dtype=torch.float32)


@lru_cache(maxsize=1)
def bf16_codes() -> Tensor:
    """Return the code of every BF16 value, ordered by its bits: [65536] uint8, CPU, read-only."""
    return _encode_bits(all_bf16())


def all_bf16() -> Tensor:
    """Return every BF16 value, ordered by its bits: [65536] bf16."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def bf16_index(x: Tensor) -> Tensor:
    """Return the bits of a BF16 tensor as table indices: x [...] → [numel] int32 in 0..65535."""
    return x.reshape(-1).view(torch.uint16).to(torch.int32)


def _rounded_magnitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the FP32 bits of |x| rounded to the grid (NaN stays), and where the sign is set."""
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"HiFloat8 rounds bfloat16, float16 or float32, not {x.dtype}: convert first"
        )
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23) - _FP32_BIAS
    distance = exponent.abs()
    # Of 23 mantissa bits, 3, 2, 1 or 0 are kept. Adding half of the last kept bit and truncating
    # rounds half away from zero. A carry goes into the exponent and gives a power of two, which
    # every binade can represent.
    dropped = 20 + (distance >= 4).int() + (distance >= 8).int() + (distance >= 16).int()
    half = torch.ones_like(dropped) << (dropped - 1)
    rounded = (magnitude + half) >> dropped << dropped
    rounded = rounded.clamp(max=_FP32_MAX_FINITE)
    # Below the smallest subnormal, [2**-23, 2**-22) is rounded up to it and the rest down to 0.
    rounded = torch.where(exponent == -23, _FP32_MIN_SUBNORMAL, rounded)
    rounded = torch.where(exponent < -23, 0, rounded)
    return torch.where(magnitude > _FP32_INFINITY, magnitude, rounded), bits < 0


def _encode_bits(x: Tensor) -> Tensor:
    magnitude, negative = _rounded_magnitude(x)
    base, shift = (table.to(x.device) for table in _binade_tables())
    binade = (magnitude >> 23).reshape(-1)
    mantissa = (magnitude >> 20 & 7).reshape(-1)
    code = base.index_select(0, binade) + (mantissa >> shift.index_select(0, binade))
    code = code.view(x.shape)
    code = torch.where(negative & (code > 0), code | SIGN_BIT, code)
    return torch.where(magnitude > _FP32_INFINITY, NAN_CODE, code).to(torch.uint8)


@lru_cache(maxsize=1)
def _binade_tables() -> tuple[Tensor, Tensor]:
    """Return two tables by FP32 exponent field: the code of its power of two, and dropped bits.

    The dropped bits are the number of mantissa bits, of 3, that HiFloat8 lacks in this binade.
    """
    base = torch.zeros(256, dtype=torch.int32)
    shift = torch.full((256,), 3, dtype=torch.int32)
    for code in range(1, SIGN_BIT):
        fields = decode_code(code)
        if fields.exponent is not None and fields.value == 2.0**fields.exponent:
            base[fields.exponent + _FP32_BIAS] = code
            shift[fields.exponent + _FP32_BIAS] = 3 - fields.mantissa_bits
    return base, shift
