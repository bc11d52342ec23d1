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
    heads = (each.transpose(1, 2) for each in (query, key, value))
    return (F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).contiguous(),)


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


REFERENCES = (npu_fusion_attention, npu_layer_norm_eval, npu_rms_norm, npu_rotary_mul, npu_gelu)


def install(patch: pytest.MonkeyPatch) -> ModuleType:
    """Put a module `torch_npu` with the references in place of the real one."""
    module = ModuleType("torch_npu")
    for function in REFERENCES:
        setattr(module, function.__name__, function)
    patch.setitem(sys.modules, "torch_npu", module)
    return module
