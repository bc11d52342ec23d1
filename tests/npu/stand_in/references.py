"""Compute the `npu::` operators that the product calls on host memory, by their documentation.

Each reference has the dispatcher's name of its operator and gets tensors on the CPU. It refuses
what the documentation excludes, so that a call that only a card would refuse fails here as well.
Sources: the operators' pages in op-plugin's `docs/` and the docstrings in torch_npu's wheel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from en_dtypes import hifloat8
from torch import Tensor

from quant.numerics.reference import product

HIFLOAT8 = 290  # torch_npu.hifloat8
INT8 = (1, torch.int8)  # the number of torch.int8, and itself
MOST = 65_535  # of the last dimension of a quantized product's operands

REFERENCES: dict[str, Callable[..., Any]] = {}


def _reference(function: Callable[..., Any]) -> Callable[..., Any]:
    REFERENCES[f"npu::{function.__name__}"] = function
    return function


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"the operator's documentation excludes this: {what}")


def _require_950(what: str) -> None:
    """Refuse what a 910B has no instruction for, with the error that CANN gives there."""
    name = os.environ.get("STAND_IN_SOC", "Ascend910B2")
    if not name.startswith("Ascend950"):
        raise RuntimeError(f"call aclnn{what} failed, error code is 161002: HIFLOAT8 on {name}")


# ---- attention ----


@_reference
def npu_fusion_attention(  # noqa: PLR0917 — the operator's own order
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    **_: Any,
) -> tuple[Any, ...]:
    """Attend; `atten_mask` is true where a score does not count."""
    _require(query.dtype in (torch.bfloat16, torch.float16, torch.float32), f"{query.dtype}")
    _require(pse is None and padding_mask is None and keep_prob == 1, "pse, padding, dropout")
    _require(sparse_mode == 0 and prefix is None, "a sparse mode has no reference here")
    _require(actual_seq_qlen is None and actual_seq_kvlen is None, "TND has no reference here")
    # Without a mask, sparse mode 0 computes the whole matrix, whatever the two numbers of tokens.
    swapped = {"BSND": (1, 2), "BNSD": None}
    _require(input_layout in swapped, f"layout {input_layout} has no reference here")
    swap = swapped[input_layout]
    q, k, v = (each if swap is None else each.transpose(*swap) for each in (query, key, value))
    _require(q.shape[1] == head_num, f"head_num {head_num}, and {q.shape[1]} heads")
    mask = None if atten_mask is None else ~atten_mask.bool()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.contiguous() if swap is None else out.transpose(*swap).contiguous()
    softmax = torch.zeros(*q.shape[:3], 8)
    return out, softmax, softmax.clone(), torch.zeros(0), 0, 0, 0


@_reference
def npu_fusion_attention_v3(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Attend, for torch's own `scaled_dot_product_attention`; the last results are tensors."""
    out = npu_fusion_attention(*args, **kwargs)
    return (*out[:4], torch.zeros(0), torch.zeros(0))


# ---- norms and rotation ----


@_reference
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return input / rms(input) * gamma, and 1 / rms in float32."""
    _require(
        input.shape[input.dim() - gamma.dim() :] == gamma.shape, "gamma is the last dimensions"
    )
    _require(gamma.dtype in (input.dtype, torch.float32), f"gamma of {gamma.dtype}")
    dims = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(input.float().pow(2).mean(dims, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@_reference
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Return input * r1 + rotated(input) * r2; in "interleave" neighbours are rotated."""
    _require(input.dim() == 4 and r1.shape == r2.shape, "four dimensions; r1 and r2 of one shape")
    _require(input.dtype == r1.dtype == r2.dtype, f"{input.dtype}, {r1.dtype} and {r2.dtype}")
    _require(input.shape[-1] < 896 and input.shape[-1] % 2 == 0, "D below 896 and even")
    _require(r1.shape[0] * r1.shape[2] < 1000, "B·N of r1 and r2 below 1000")
    _require(rotary_mode in ("half", "interleave") and rotate is None, rotary_mode)
    x = input.float()
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([-second, first], -1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


@_reference
def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimensions; computed in float32, and the weights' steps rounded each."""
    normed = F.layer_norm(input.float(), normalized_shape, eps=eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(input.dtype)


def native_layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return torch's; of BF16 with float32 weights that of float32, which the CPU's own is not."""
    wide = input if weight is None else input.to(weight.dtype)
    found = torch.native_layer_norm(wide, normalized_shape, weight, bias, eps)
    return found[0].to(input.dtype), found[1], found[2]


REFERENCES["aten::native_layer_norm"] = native_layer_norm


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Return torch's; of BF16 with sums in FP32 that are rounded once, on every CPU."""
    _require(beta == alpha == 1, "factors have no reference here")
    return product(mat1, mat2.t(), input)


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    """Return torch's; of BF16 with sums in FP32 that are rounded once, on every CPU."""
    return product(self, mat2.t(), None)


REFERENCES |= {"aten::addmm": addmm, "aten::mm": mm}


@_reference
def npu_gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    """Return GELU; computed in float32."""
    _require(approximate in ("none", "tanh"), approximate)
    return F.gelu(self.float(), approximate=approximate).to(self.dtype)


# ---- quantization ----


def _encode_hif8(x: Tensor) -> Tensor:
    """x → codes [uint8], rounded half away from zero; what is too large saturates."""
    values = x.float().clamp(-32768, 32768).numpy()
    return torch.from_numpy(values.astype(hifloat8).view(np.uint8).copy())


def _decode_hif8(codes: Tensor) -> Tensor:
    """Codes [uint8] → float32."""
    return torch.from_numpy(codes.contiguous().numpy().view(hifloat8).astype(np.float32))


@_reference
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | torch.dtype | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize under the largest magnitude of each token or of the tensor: x ≈ y * scale."""
    _require(input.dtype in (torch.bfloat16, torch.float16), f"{input.dtype}")
    _require(smooth_scales is None and group_index is None, "no reference for smooth scales")
    _require(quant_mode in ("pertoken", "pertensor"), f"no reference for {quant_mode}")
    x = input.float()
    amax = x.abs().amax(-1) if quant_mode == "pertoken" else x.abs().amax()[None]
    if dst_type == HIFLOAT8:
        _require_950("DynamicQuantV4")
        scale = amax / (dst_type_max or 32768.0)
    else:
        _require(dst_type in (None, *INT8), f"no reference for {dst_type}")
        scale = amax / 127
    wide = scale.unsqueeze(-1) if quant_mode == "pertoken" else scale
    scaled = torch.where(wide > 0, x / wide, 0)
    if dst_type == HIFLOAT8:
        return _encode_hif8(scaled), scale
    return scaled.round().clamp(-128, 127).to(torch.int8), scale


@_reference
def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int | torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """Quantize under given scales: input / scales with `div_mode`, otherwise input * scales."""
    x, by = input.float(), scales.float()
    if by.numel() > 1:
        shape = [1] * x.dim()
        shape[axis] = -1
        by = by.reshape(shape)
    scaled = x / by if div_mode else x * by
    if zero_points is not None:
        scaled = scaled + zero_points.float()
    if dtype == HIFLOAT8:
        _require_950("Quantize")
        return _encode_hif8(scaled)
    _require(dtype in INT8, f"no reference for {dtype}")
    return scaled.round().clamp(-128, 127).to(torch.int8)


@_reference
def npu_dtype_cast(input: Tensor, dtype: Any, input_dtype: int | None = None) -> Tensor:
    """Convert to or from hifloat8 codes."""
    _require_950("Cast")
    if dtype == HIFLOAT8:
        return _encode_hif8(input)
    _require(input_dtype == HIFLOAT8, f"no reference for {input_dtype} → {dtype}")
    numbers = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
    return _decode_hif8(input).to(numbers.get(dtype, dtype))


@_reference
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    **others: Any,
) -> Tensor:
    """Multiply quantized x1 [M, K] by x2 [K, N] and scale the product for each row and column."""
    _require(offset is None and all(each is None for each in others.values()), "no reference")
    _require(max(x1.shape[-1], x2.shape[-1]) <= MOST, f"last dimensions beyond {MOST}")
    _require(x1.shape[-1] == x2.shape[-2], f"{list(x1.shape)} x {list(x2.shape)}")
    if x1_dtype == HIFLOAT8:
        _require_950("QuantMatmulV5")
        _require(x2_dtype == HIFLOAT8, f"x2 is {x2_dtype}")
        product = _decode_hif8(x1) @ _decode_hif8(x2)
    else:
        _require(x1.dtype == x2.dtype == torch.int8, f"{x1.dtype} x {x2.dtype}")
        product = x1.double() @ x2.double()  # exact: sums stay below 2^53
        if bias is not None and bias.dtype is torch.int32:
            product, bias = product + bias, None
        product = product.float()
    product = product * scale.float()
    if pertoken_scale is not None:
        rows = pertoken_scale.float()
        product = product * (rows.unsqueeze(-1) if rows.numel() > 1 else rows)
    if bias is not None:
        product = product + bias.float()
    numbers = {None: torch.int8, 1: torch.float16, 5: torch.float16, 15: torch.bfloat16}
    return product.to(numbers.get(output_dtype, output_dtype))


@_reference
def npu_format_cast(input: Tensor, acl_format: int, **_: Any) -> Tensor:
    """Return a copy: layouts are the card's own business."""
    return input.clone()
