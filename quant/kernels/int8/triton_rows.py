"""Round tokens to INT8 on a GPU, and make a product's outputs of its sums, in one pass each.

These are Triton kernels with the arithmetic of `quant.numerics.int8`, to the last bit: divisions
are rounded as IEEE 754 asks, and a multiplication and an addition are not joined into one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.numerics.int8 import QMAX

_WARPS = 8
_COLUMNS = 4096  # of outputs, per Triton program


@triton.jit
def _quantize(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, N: tl.constexpr, QMAX: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, N)
    mask = columns < K
    x = tl.load(x_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
    # Reductions may drop NaN, so it is counted. NaN and infinity are what x - x does not make 0.
    finite = tl.sum((x - x != 0).to(tl.int32)) == 0
    amax = tl.max(tl.abs(x))
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, QMAX * 1.0))
    scale = tl.where(finite, scale, float("nan"))
    tl.store(scale_ptr + row, scale)
    ratio = tl.where(finite, tl.div_rn(x, scale + tl.zeros_like(x)), 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -QMAX * 1.0), QMAX * 1.0)
    # Where 1.5 * 2**23 is added, float32 has no fractions left: it rounds half to even.
    rounded = (ratio + 12582912.0) - 12582912.0
    tl.store(out_ptr + row * K + columns, rounded.to(tl.int8), mask=mask)


@triton.jit
def _rescale(
    sums_ptr, act_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    width, sums_stride, N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    mask = columns < width
    out = tl.load(sums_ptr + row * sums_stride + columns, mask=mask, other=0).to(tl.float32)
    out = out * tl.load(weight_scale_ptr + columns, mask=mask, other=0.0)
    out = out * tl.load(act_scale_ptr + row)
    if HAS_BIAS:
        out = out + tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, out.to(tl.bfloat16), mask=mask)


def quantize(x: Tensor, out: Tensor) -> Tensor:
    """Write the codes of x [M, K] bf16, contiguous, into out [M, K] int8; return [M, 1] float32."""
    rows, inputs = x.shape
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _quantize[(rows,)](
        x, out, scale, K=inputs, N=triton.next_power_of_2(inputs), QMAX=QMAX, num_warps=_WARPS
    )
    return scale


def rescale(
    sums: Tensor, act_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Write `quant.numerics.int8.rescale` of sums [M, at least N] int32 into out [M, N] bf16.

    Sums may have more columns than the output, which are left out.
    """
    rows, width = out.shape
    _rescale[(rows, triton.cdiv(width, _COLUMNS))](
        sums, act_scale, weight_scale, bias, out, width, sums.stride(0),
        N=_COLUMNS, HAS_BIAS=bias is not None, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
