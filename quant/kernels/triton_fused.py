"""Run the operations between a Wan block's matrix products, each in one pass through memory.

These are Triton kernels for CUDA. Each reads BF16, computes in float32 and rounds to BF16 wherever
diffusers' unfused block does. It writes BF16 or, if it gets an `act_scale`, E4M3 codes of HiFloat8
values: x / act_scale rounded to HiFloat8's grid, the input of the next product
(`quant.kernels.cuda`). A Triton program handles one row.

Every HiFloat8 value from 2**-8 to 384, and 2**-9, is an E4M3 value. Larger ones saturate to 448,
smaller ones are rounded to the nearest E4M3 subnormal or zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from quant.kernels.interface import AttentionScales, Norm, Rope
from quant.numerics.hadamard import GROUP

E4M3 = torch.float8_e4m3fn
_ELEMENTS = 2048  # per program of the elementwise kernel
_WARPS = 4
_GROUP_BITS = GROUP.bit_length() - 1


@triton.jit
def _to_hif8(x):
    """Round float32 to HiFloat8's grid, half away from zero; E4M3 saturates larger values later."""
    bits = x.to(tl.int32, bitcast=True)
    distance = tl.abs(((bits >> 23) & 0xFF) - 127)
    # 3 mantissa bits up to three binades from 1, 2 up to seven, then 1.
    coarser = tl.minimum(distance >> 2, 2)
    half = (1 << 19) << coarser
    rounded = ((bits + half) & (-2 * half)).to(tl.float32, bitcast=True)
    # The addition would overflow the largest NaN into zero.
    return tl.where(x == x, rounded, x)  # noqa: PLR0124


@triton.jit
def _store(ptr, x, inverse_scale, mask, ROUND: tl.constexpr):
    """Store x as BF16, or round that BF16 value to HiFloat8 and store its E4M3 code."""
    x = x.to(tl.bfloat16)
    if ROUND:
        tl.store(ptr, _to_hif8(x.to(tl.float32) * inverse_scale).to(tl.float8e4nv), mask=mask)
    else:
        tl.store(ptr, x, mask=mask)


@triton.jit
def _sum_gated(x_ptr, delta_ptr, gate_ptr, columns, mask, HAS_GATE: tl.constexpr):
    """Compute x + delta * gate, rounded to BF16."""
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        delta *= tl.load(gate_ptr + columns, mask=mask, other=0.0)
    return (x + delta).to(tl.bfloat16)


@triton.jit
def _factors(factor_ptr, shift_ptr, columns, mask, PLUS_ONE: tl.constexpr):
    factor = tl.load(factor_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor += 1.0
    return factor, tl.load(shift_ptr + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_norm(
    x_ptr, delta_ptr, gate_ptr, factor_ptr, shift_ptr, sum_ptr, out_ptr,
    rows, gate_stride, factor_stride, inverse_scale, eps,
    K: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_GATE: tl.constexpr, PLUS_ONE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    start = (batch * rows + tl.program_id(0)) * K
    a = tl.arange(0, A)
    b = A + tl.arange(0, B)
    in_a, in_b = a < K, b < K
    if HAS_DELTA:
        gate_ptr += batch * gate_stride
        sum_a = _sum_gated(x_ptr + start, delta_ptr + start, gate_ptr, a, in_a, HAS_GATE)
        sum_b = _sum_gated(x_ptr + start, delta_ptr + start, gate_ptr, b, in_b, HAS_GATE)
        tl.store(sum_ptr + start + a, sum_a, mask=in_a)
        tl.store(sum_ptr + start + b, sum_b, mask=in_b)
        x_a, x_b = sum_a.to(tl.float32), sum_b.to(tl.float32)
    else:
        x_a = tl.load(x_ptr + start + a, mask=in_a, other=0.0).to(tl.float32)
        x_b = tl.load(x_ptr + start + b, mask=in_b, other=0.0).to(tl.float32)
    mean = (tl.sum(x_a) + tl.sum(x_b)) / K
    x_a = tl.where(in_a, x_a - mean, 0.0)
    x_b = tl.where(in_b, x_b - mean, 0.0)
    scale = tl.rsqrt((tl.sum(x_a * x_a) + tl.sum(x_b * x_b)) / K + eps)
    # Loaded only here: an earlier load takes registers and so lowers the occupancy.
    factor_ptr += batch * factor_stride
    shift_ptr += batch * factor_stride
    factor_a, shift_a = _factors(factor_ptr, shift_ptr, a, in_a, PLUS_ONE)
    factor_b, shift_b = _factors(factor_ptr, shift_ptr, b, in_b, PLUS_ONE)
    _store(out_ptr + start + a, x_a * scale * factor_a + shift_a, inverse_scale, in_a, ROUND)
    _store(out_ptr + start + b, x_b * scale * factor_b + shift_b, inverse_scale, in_b, ROUND)


@triton.jit
def _add_gated(
    x_ptr, delta_ptr, gate_ptr, out_ptr, rows_per_batch, gate_stride,
    K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row // rows_per_batch * gate_stride
    a = tl.arange(0, A)
    b = A + tl.arange(0, B)
    in_a, in_b = a < K, b < K
    x_ptr, delta_ptr, out_ptr = x_ptr + row * K, delta_ptr + row * K, out_ptr + row * K
    tl.store(out_ptr + a, _sum_gated(x_ptr, delta_ptr, gate_ptr, a, in_a, HAS_GATE), mask=in_a)
    tl.store(out_ptr + b, _sum_gated(x_ptr, delta_ptr, gate_ptr, b, in_b, HAS_GATE), mask=in_b)


@triton.jit
def _rotated(
    x, weight, cos_ptr, sin_ptr, start, rms, N: tl.constexpr, HEAD: tl.constexpr,
    ROPE: tl.constexpr,
):  # fmt: skip
    """Normalise N columns from `start` on and rotate neighbouring pairs."""
    x = (x * rms * weight).to(tl.bfloat16).to(tl.float32)
    if ROPE:
        # diffusers stores each angle twice and reads the even cosine and the odd sine.
        if N % HEAD == 0 and (HEAD & (HEAD - 1)) == 0:
            first, second = tl.split(tl.reshape(x, (N // HEAD, HEAD // 2, 2)))
            even = 2 * tl.arange(0, HEAD // 2)
            cos = tl.load(cos_ptr + even)[None, :]
            sin = tl.load(sin_ptr + even + 1)[None, :]
        else:
            first, second = tl.split(tl.reshape(x, (N // 2, 2)))
            even = (start + 2 * tl.arange(0, N // 2)) % HEAD
            cos = tl.load(cos_ptr + even)
            sin = tl.load(sin_ptr + even + 1)
        rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
        x = tl.reshape(rotated, (N,))
    return x


@triton.jit
def _butterfly(x, N: tl.constexpr, STRIDE: tl.constexpr):
    """Replace each two values that are STRIDE apart by their sum and their difference."""
    pairs = tl.trans(tl.reshape(x, (N // (2 * STRIDE), 2, STRIDE)), 0, 2, 1)
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.trans(pairs, 0, 2, 1), (N,))


@triton.jit
def _rotate_groups(x, N: tl.constexpr, GROUP_BITS: tl.constexpr):
    """Do `quant.numerics.hadamard.rotate_groups`."""
    for bit in tl.static_range(GROUP_BITS):
        x = _butterfly(x, N, 1 << bit)
    return x / tl.sqrt((1 << GROUP_BITS) * 1.0)


@triton.jit
def _norm_rope(
    x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    row_stride, rows, eps, q_inverse, k_inverse, v_inverse,
    K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, HEAD: tl.constexpr,
    ROPE: tl.constexpr, ROTATE_BITS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = tl.program_id(2)
    a = tl.arange(0, A)
    b = A + tl.arange(0, B)
    in_a, in_b = a < K, b < K
    x_ptr += (batch * rows + row) * row_stride + part * K
    x_a = tl.load(x_ptr + a, mask=in_a, other=0.0).to(tl.float32)
    x_b = tl.load(x_ptr + b, mask=in_b, other=0.0).to(tl.float32)
    if part == 2:
        v_ptr += (batch * rows + row) * K
        _store(v_ptr + a, x_a, v_inverse, in_a, ROUND)
        _store(v_ptr + b, x_b, v_inverse, in_b, ROUND)
    else:
        weight_ptr, out_ptr, inverse_scale = q_weight_ptr, q_ptr, q_inverse
        if part == 1:
            weight_ptr, out_ptr, inverse_scale = k_weight_ptr, k_ptr, k_inverse
        weight_a = tl.load(weight_ptr + a, mask=in_a, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + b, mask=in_b, other=0.0).to(tl.float32)
        rms = tl.rsqrt((tl.sum(x_a * x_a) + tl.sum(x_b * x_b)) / K + eps)
        cos_ptr += row * HEAD
        sin_ptr += row * HEAD
        x_a = _rotated(x_a, weight_a, cos_ptr, sin_ptr, 0, rms, A, HEAD, ROPE)
        x_b = _rotated(x_b, weight_b, cos_ptr, sin_ptr, A, rms, B, HEAD, ROPE)
        if ROTATE_BITS:
            x_a = _rotate_groups(x_a.to(tl.bfloat16).to(tl.float32), A, ROTATE_BITS)
            x_b = _rotate_groups(x_b.to(tl.bfloat16).to(tl.float32), B, ROTATE_BITS)
        out_ptr += (batch * rows + row) * K
        _store(out_ptr + a, x_a, inverse_scale, in_a, ROUND)
        _store(out_ptr + b, x_b, inverse_scale, in_b, ROUND)


@triton.jit
def _elementwise(x_ptr, out_ptr, count, inverse_scale, GELU: tl.constexpr, ROUND: tl.constexpr,
                 N: tl.constexpr):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = position < count
    x = tl.load(x_ptr + position, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        # 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x³); the
        # constants hold -2 sqrt(2/pi) / ln(2).
        x = x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * (x * x))))
    _store(out_ptr + position, x, inverse_scale, mask, ROUND)


def add_norm(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, norm: Norm, act_scale: float | None
) -> tuple[Tensor, Tensor]:
    """Implement `Kernels.add_norm`; the rows of gate, factor and shift must be contiguous."""
    batch, tokens, width = x.shape
    out = torch.empty_like(x, dtype=x.dtype if act_scale is None else E4M3)
    total = x if delta is None else torch.empty_like(x)
    high, low = _column_ranges(width)
    _add_norm[(tokens, batch)](
        x, x if delta is None else delta, norm.factor if gate is None else gate,
        norm.factor, norm.shift, total, out,
        tokens, _batch_stride(gate), _batch_stride(norm.factor), _inverse(act_scale), norm.eps,
        K=width, A=high, B=low, HAS_DELTA=delta is not None, HAS_GATE=gate is not None,
        PLUS_ONE=norm.plus_one, ROUND=act_scale is not None, num_warps=_WARPS,
    )  # fmt: skip
    return total, out


def add_gated(x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
    """Return x + delta * gate in a new tensor; x, delta [B, S, K] bf16, gate [B or 1, K] fp32."""
    batch, tokens, width = x.shape
    out = torch.empty_like(x)
    high, low = _column_ranges(width)
    _add_gated[(batch * tokens,)](
        x, delta, x if gate is None else gate, out, tokens, _batch_stride(gate),
        K=width, A=high, B=low, HAS_GATE=gate is not None, num_warps=_WARPS,
    )  # fmt: skip
    return out


def norm_rope(
    x: Tensor,
    q_norm: nn.RMSNorm,
    k_norm: nn.RMSNorm | None,
    rope: Rope | None,
    heads: int,
    scales: AttentionScales | None,
) -> tuple[Tensor, ...]:
    """Implement `Kernels.norm_rope`; with `scales` the parts are E4M3."""
    batch, tokens, columns = x.shape
    width = q_norm.weight.shape[0]
    parts = columns // width
    dtype = x.dtype if scales is None else E4M3
    shape = (batch, tokens, heads, width // heads)
    outs = [torch.empty(shape, dtype=dtype, device=x.device) for _ in range(parts)]
    q, k, v = (outs[min(index, parts - 1)] for index in range(3))
    cos, sin = (q_norm.weight, q_norm.weight) if rope is None else rope
    each_scale = (None, None, None) if scales is None else (scales.q, scales.k, scales.v)
    high, low = _column_ranges(width)
    _norm_rope[(tokens, parts, batch)](
        x, q_norm.weight, (q_norm if k_norm is None else k_norm).weight, cos, sin, q, k, v,
        x.stride(1), tokens, q_norm.eps, *map(_inverse, each_scale),
        K=width, A=high, B=low, HEAD=width // heads, ROPE=rope is not None,
        ROTATE_BITS=_GROUP_BITS if scales is not None and scales.rotate else 0,
        ROUND=scales is not None, num_warps=_WARPS,
    )  # fmt: skip
    return tuple(outs)


def gelu(x: Tensor, act_scale: float | None) -> Tensor:
    """Compute GELU in its tanh form: x [...] bf16 contiguous → [...]."""
    return _map(x, act_scale, gelu=True)


def round_act(x: Tensor, act_scale: float) -> Tensor:
    """Round to HiFloat8: x [...] bf16 contiguous → [...] E4M3."""
    return _map(x, act_scale, gelu=False)


def _map(x: Tensor, act_scale: float | None, *, gelu: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=x.dtype if act_scale is None else E4M3)
    _elementwise[(triton.cdiv(x.numel(), _ELEMENTS),)](
        x, out, x.numel(), _inverse(act_scale), GELU=gelu, ROUND=act_scale is not None,
        N=_ELEMENTS, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _column_ranges(width: int) -> tuple[int, int]:
    """Return two powers of two that together cover a width: 5120 is exactly 4096 + 1024."""
    high = 1 << (width.bit_length() - 1)
    return high, triton.next_power_of_2(max(width - high, GROUP))


def _batch_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _inverse(scale: float | None) -> float:
    return 1.0 if scale is None else 1.0 / scale
