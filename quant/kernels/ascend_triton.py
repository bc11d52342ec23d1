"""Run the operations between a Wan block's matrix products on an Ascend 910B, in Triton.

Each kernel reads BF16 (or ranks), computes in float32 in the order of `quant.kernels.eager`, and
writes BF16: one pass through memory, where torch_npu's operations take one for each step
(`quant.kernels.ascend`). Rounding and decoding have some twenty steps.

A kernel runs one program on each vector core, which goes over many rows or blocks. One for each
row, as on a GPU, would not start: triton-ascend refuses more than 65,535 programs, and a video at
1280x720 has 75,600 tokens. The loop also lets the compiler give loads and stores two buffers each,
so that copying and computing overlap, and factors and shifts are loaded once. It is the only loop
that may remain in a compiled kernel: `tests/npu` lowers every kernel for the 910B and counts.

A shift by an amount that differs between elements is one instruction on a GPU. A vector core has
none: the compiler makes a loop over single elements of it. Rounding gets the size of its step from
the exponent field of a small float instead. It works on BF16's own 16 bits, of which an instruction
takes twice as many numbers as of 32.
"""

from __future__ import annotations

from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.ascend import AscendKernels
from quant.kernels.interface import Norm
from quant.numerics.hif8_int16 import scale_exponent

BLOCK = 8192
"""Elements of a block: 16 KiB of BF16, of the 192 KiB that a vector core has."""

ROW_BLOCK = 2048
"""Weights of a block within a row: 5,120 and 13,824 are nearly multiples of it."""

PLAIN, SHIFTED, DIVIDED = 0, 1, 2
"""How a result is rounded: to BF16; to HiFloat8 too, on BF16's bits, which a power-of-two scale
only shifts; or under any other scale, in float32."""

WHOLE, BY_ROW = 3, 4
"""How decoded weights are multiplied if a shift is not enough: by one scale, or by each row's."""


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


@triton.jit
def _rounded(x, scale_bits, scale, ROUND: tl.constexpr):
    """Round float32 to BF16, and that to HiFloat8 as ROUND says."""
    x = x.to(tl.bfloat16)
    if ROUND == 1:  # SHIFTED
        bits = round_bits(x.to(tl.int16, bitcast=True), scale_bits, 7)
        x = bits.to(tl.bfloat16, bitcast=True)
    if ROUND == 2:  # DIVIDED
        bits = (x.to(tl.float32) / scale).to(tl.int32, bitcast=True)
        x = (round_bits(bits, scale_bits, 23).to(tl.float32, bitcast=True) * scale).to(tl.bfloat16)
    return x


@triton.jit
def _elementwise(
    x_ptr, out_ptr, count, scale_bits, scale,
    GELU: tl.constexpr, ROUND: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    position = tl.arange(0, N)
    first = tl.program_id(0).to(tl.int64) * N
    for start in range(first, count, tl.num_programs(0) * N):
        mask = position < count - start
        x = tl.load(x_ptr + start + position, mask=mask)
        if GELU:
            x = x.to(tl.float32)
            # 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x³)
            x = x / (1.0 + tl.exp(x * (-1.5957691216 - 0.0713548162726 * (x * x))))
        tl.store(out_ptr + start + position, _rounded(x, scale_bits, scale, ROUND), mask=mask)


@triton.jit
def _sum_gated(x_ptr, delta_ptr, gate, columns, mask, HAS_GATE: tl.constexpr):
    """Compute x + delta * gate, rounded to BF16."""
    x = tl.load(x_ptr + columns, mask=mask).to(tl.float32)
    delta = tl.load(delta_ptr + columns, mask=mask).to(tl.float32)
    if HAS_GATE:
        delta *= gate
    return (x + delta).to(tl.bfloat16)


@triton.jit
def _add_gated(
    x_ptr, delta_ptr, gate_ptr, out_ptr, rows, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    a = tl.arange(0, A)
    b = A + tl.arange(0, B)
    in_a, in_b = a < K, b < K
    gate_a = tl.load(gate_ptr + a, mask=in_a).to(tl.float32)
    gate_b = tl.load(gate_ptr + b, mask=in_b).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * K
        sum_a = _sum_gated(x_ptr + start, delta_ptr + start, gate_a, a, in_a, True)
        sum_b = _sum_gated(x_ptr + start, delta_ptr + start, gate_b, b, in_b, True)
        tl.store(out_ptr + start + a, sum_a, mask=in_a)
        tl.store(out_ptr + start + b, sum_b, mask=in_b)


@triton.jit
def _add_norm(
    x_ptr, delta_ptr, gate_ptr, factor_ptr, shift_ptr, sum_ptr, out_ptr,
    rows, scale_bits, scale, eps,
    K: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_GATE: tl.constexpr, PLUS_ONE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    a = tl.arange(0, A)
    b = A + tl.arange(0, B)
    in_a, in_b = a < K, b < K
    factor_a = tl.load(factor_ptr + a, mask=in_a).to(tl.float32)
    factor_b = tl.load(factor_ptr + b, mask=in_b).to(tl.float32)
    if PLUS_ONE:
        factor_a += 1.0
        factor_b += 1.0
    shift_a = tl.load(shift_ptr + a, mask=in_a).to(tl.float32)
    shift_b = tl.load(shift_ptr + b, mask=in_b).to(tl.float32)
    gate_a, gate_b = factor_a, factor_b
    if HAS_GATE:
        gate_a = tl.load(gate_ptr + a, mask=in_a).to(tl.float32)
        gate_b = tl.load(gate_ptr + b, mask=in_b).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * K
        if HAS_DELTA:
            sum_a = _sum_gated(x_ptr + start, delta_ptr + start, gate_a, a, in_a, HAS_GATE)
            sum_b = _sum_gated(x_ptr + start, delta_ptr + start, gate_b, b, in_b, HAS_GATE)
            tl.store(sum_ptr + start + a, sum_a, mask=in_a)
            tl.store(sum_ptr + start + b, sum_b, mask=in_b)
        else:
            sum_a = tl.load(x_ptr + start + a, mask=in_a)
            sum_b = tl.load(x_ptr + start + b, mask=in_b)
        x_a, x_b = sum_a.to(tl.float32), sum_b.to(tl.float32)
        # The first part is always full. Without the second's columns beyond K, nothing is masked.
        if A + B > K:
            x_b = tl.where(in_b, x_b, 0.0)
        mean = (tl.sum(x_a) + tl.sum(x_b)) * (1.0 / K)
        x_a -= mean
        x_b -= mean
        if A + B > K:
            x_b = tl.where(in_b, x_b, 0.0)
        variance = (tl.sum(x_a * x_a) + tl.sum(x_b * x_b)) * (1.0 / K)
        inverse = tl.rsqrt(variance + eps)
        out_a = _rounded(x_a * inverse * factor_a + shift_a, scale_bits, scale, ROUND)
        out_b = _rounded(x_b * inverse * factor_b + shift_b, scale_bits, scale, ROUND)
        tl.store(out_ptr + start + a, out_a, mask=in_a)
        tl.store(out_ptr + start + b, out_b, mask=in_b)


@triton.jit
def _bits_of_ranks(ranks, scale_bits):
    """Return the BF16 bits of values with the given ranks, times a power of two.

    With the rank, BF16's bits rise by 128 up to rank 8, by 64 up to 24, by 32 up to 40, by 16 up to
    96, by 32 up to 112, and by 64 above: a sum of ranks that are clamped at these corners.
    """
    bits = ranks.to(tl.float16).to(tl.int16, bitcast=True)
    magnitude = bits & 0x7FFF
    sign = bits - magnitude
    # 1024 and above, FP16's last bit is worth 1: a conversion to integers without leaving 16 bits.
    rank = (magnitude.to(tl.float16, bitcast=True) + 1024.0).to(tl.int16, bitcast=True) - 0x6400
    twice = _at_most(rank, 8) * 2 + _at_most(rank, 24) + _at_least(rank, 112)
    linear = twice * 2 + rank + _at_most(rank, 40) + _at_least(rank, 96)
    # 0 for rank 0, otherwise the bits of the smallest value less its slope. At the two upper
    # corners, lower ranks are counted as the corner, which is 16 * (2 * 112 + 96) too much.
    first = _at_most(rank, 1) * (scale_bits - (23 << 7)).to(tl.int16)
    return (linear * 16 - 5120 + first) | sign


@triton.jit
def _at_most(rank, BOUND: tl.constexpr):
    return tl.minimum(rank, tl.full((), BOUND, tl.int16))


@triton.jit
def _at_least(rank, BOUND: tl.constexpr):
    return tl.maximum(rank, tl.full((), BOUND, tl.int16))


@triton.jit
def _decode(
    ranks_ptr, scale_ptr, out_ptr, rows, columns, scale_bits, scale,
    SCALE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    position = tl.arange(0, N)
    blocks = tl.cdiv(columns, N)
    for block in range(tl.program_id(0).to(tl.int64), rows * blocks, tl.num_programs(0)):
        row = block // blocks
        column = (block - row * blocks) * N
        mask = position < columns - column
        start = row * columns + column
        ranks = tl.load(ranks_ptr + start + position, mask=mask)
        value = _bits_of_ranks(ranks, scale_bits).to(tl.bfloat16, bitcast=True)
        if SCALE == 4:  # BY_ROW
            scale = tl.load(scale_ptr + row)
        if SCALE != 1:  # not SHIFTED
            value = (value.to(tl.float32) * scale).to(tl.bfloat16)
        tl.store(out_ptr + start + position, value, mask=mask)


class AscendTritonKernels(AscendKernels):
    """The same operations as its base's, where Triton saves passes through memory."""

    name = "ascend+triton"

    def __init__(self, programs: int, *, mixed_norm: bool = False) -> None:
        """Make the kernels.

        Args:
            programs: programs of each kernel: as many as the device has vector cores.
            mixed_norm: see the base.
        """
        super().__init__(mixed_norm=mixed_norm)
        self._programs = programs

    @classmethod
    def load(cls, device: torch.device) -> Self:
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
        return cls(properties["num_vectorcore"])

    def decode(
        self, ranks: Tensor, weight_scale: float | Tensor, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(ranks.shape, dtype=torch.bfloat16, device=ranks.device)
        if isinstance(weight_scale, Tensor):
            (rows, columns), block = ranks.shape, ROW_BLOCK
            scales, form, bits, scale = weight_scale, BY_ROW, _ONE, 1.0
        else:
            rows, columns, block = 1, ranks.numel(), BLOCK
            scales = ranks  # not read
            form, bits, scale = _form(weight_scale)
            if form == DIVIDED:
                form, bits = WHOLE, _ONE
        _decode[self._grid(rows * triton.cdiv(columns, block))](
            ranks, scales, out, rows, columns, bits, scale, SCALE=form, N=block
        )
        return out

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        total = x if delta is None else torch.empty_like(x)
        form, bits, scale = _form(act_scale)
        tokens, width = x.shape[1:]
        a, b = _column_ranges(width)
        for index in range(x.shape[0]):
            factor, shift = _row(norm.factor, index), _row(norm.shift, index)
            _add_norm[self._grid(tokens)](
                x[index], x[index] if delta is None else delta[index],
                factor if gate is None else _row(gate, index), factor, shift,
                total[index], out[index], tokens, bits, scale, norm.eps,
                K=width, A=a, B=b, HAS_DELTA=delta is not None, HAS_GATE=gate is not None,
                PLUS_ONE=norm.plus_one, ROUND=form,
            )  # fmt: skip
        return total, out

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return super().add_gated(x, delta, gate)  # is one pass already
        out = torch.empty_like(x)
        tokens, width = x.shape[1:]
        a, b = _column_ranges(width)
        for index in range(x.shape[0]):
            _add_gated[self._grid(tokens)](
                x[index], delta[index], _row(gate, index), out[index], tokens, K=width, A=a, B=b
            )
        return out

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        return self._map(x, act_scale, gelu=True)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        return x if act_scale is None else self._map(x, act_scale, gelu=False)

    def _map(self, x: Tensor, act_scale: float | None, *, gelu: bool) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        form, bits, scale = _form(act_scale)
        _elementwise[self._grid(triton.cdiv(x.numel(), BLOCK))](
            x, out, x.numel(), bits, scale, GELU=gelu, ROUND=form, N=BLOCK
        )
        return out

    def _grid(self, pieces: int) -> tuple[int]:
        return (max(1, min(self._programs, pieces)),)


_ONE, _FLOAT32_ONE = 127 << 7, 127 << 23
"""The bits of 1 in BF16 and in float32."""


def _form(scale: float | None) -> tuple[int, int, float]:
    """Return how to round under a scale, the bits that `round_bits` wants, and the scale itself."""
    if scale is None:
        return PLAIN, _ONE, 1.0
    exponent = scale_exponent(scale)
    if exponent is None:
        return DIVIDED, _FLOAT32_ONE, scale
    return SHIFTED, (127 + exponent) << 7, scale


def _row(x: Tensor, index: int) -> Tensor:
    """Return the row of a batch's element: of x [B, K], or of x [1, K] for all."""
    return x[index if x.shape[0] > 1 else 0]


def _column_ranges(width: int) -> tuple[int, int]:
    """Return two powers of two that together cover a width: 5120 is exactly 4096 + 1024."""
    first = 1 << ((width - 1).bit_length() - 1)
    return first, triton.next_power_of_2(width - first)
