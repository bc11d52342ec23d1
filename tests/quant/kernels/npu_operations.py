"""Exact references of the torch_npu operations that kernels for Ascend call.

They have the signatures of torch_npu 2.13 and work on CPU tensors. What an operation rounds inside
is rounded as plain torch does in `quant.kernels.eager`, so that kernels built on exact operations
can be compared with it to the last bit.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.eager import rotate
from quant.numerics import hif8


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *masks: Any,
    scale: float = 1.0,
    inner_precise: int = 0,
) -> tuple[Tensor, ...]:
    """Attend in the layout BSND without a mask."""
    assert input_layout == "BSND"
    assert query.shape[2] == key.shape[2] == value.shape[2] == head_num
    assert not masks
    assert inner_precise == 0
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return (F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous(),)


def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    """Normalise in float32; the weights are applied afterwards, with a rounding for each."""
    normed = F.layer_norm(input.float(), normalized_shape, eps=eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.type_as(input)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """Return torch's RMS norm and the factor that it multiplied by."""
    rstd = input.float().pow(2).mean(-1, keepdim=True).add(epsilon).rsqrt()
    return F.rms_norm(input, gamma.shape, gamma, epsilon), rstd


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate_: Tensor | None = None
) -> Tensor:
    """Rotate neighbouring channels."""
    assert rotary_mode == "interleave"
    assert rotate_ is None
    assert input.dtype == r1.dtype == r2.dtype, "the operation takes one type"
    assert input.shape[0] * input.shape[2] < 1000
    assert input.shape[3] < 896
    return rotate(input, (r1, r2))


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Return torch's GELU."""
    return F.gelu(input, approximate=approximate)


HIFLOAT8 = 290


def npu_dtype_cast(input: Tensor, dtype: Any, input_dtype: int | None = None) -> Tensor:
    """Convert to HiFloat8 codes or from them."""
    if dtype == HIFLOAT8:
        return hif8.encode(input)
    assert input_dtype == HIFLOAT8
    return hif8.decode(input, dtype)


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """Multiply by one factor and convert to HiFloat8 codes."""
    assert zero_points is None
    assert (dtype, axis, div_mode, scales.numel()) == (HIFLOAT8, -1, False, 1)
    return hif8.encode(input.float() * scales)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor,
    output_dtype: torch.dtype,
    x1_dtype: int,
    x2_dtype: int,
) -> Tensor:
    """Multiply HiFloat8 codes, x1 [M, K] by x2 [K, N], under one scale for x1."""
    assert x1.dtype is x2.dtype is torch.uint8
    assert x1_dtype == x2_dtype == HIFLOAT8
    assert pertoken_scale.numel() == 1
    assert scale.shape in ((1,), (x2.shape[1],))
    product = hif8.decode(x1, torch.float32) @ hif8.decode(x2.contiguous(), torch.float32)
    return (product * scale * pertoken_scale).to(output_dtype)


REFERENCES = (
    npu_dtype_cast,
    npu_fusion_attention,
    npu_gelu,
    npu_layer_norm_eval,
    npu_quant_matmul,
    npu_quantize,
    npu_rms_norm,
    npu_rotary_mul,
)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    """Compute torch's layer norm of BF16 with float32 weights as of float32, rounded once.

    The CPU's own, for these two types, differs in the last bit of some values.
    """
    if weight is None or weight.dtype is input.dtype:
        return torch.layer_norm(input, normalized_shape, weight, bias, eps)
    normed = torch.layer_norm(input.to(weight.dtype), normalized_shape, weight, bias, eps)
    return normed.type_as(input)


def install(patch: pytest.MonkeyPatch) -> ModuleType:
    """Put a module `torch_npu` with the references in place of the real one."""
    patch.setattr(F, "layer_norm", layer_norm)
    module = ModuleType("torch_npu")
    for function in REFERENCES:
        setattr(module, function.__name__, function)
    module.hifloat8 = HIFLOAT8  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "torch_npu", module)
    return module
