"""Implement INT8 in plain torch, the reference for every other kernel.

Codes are the integers from -127 to 127; -128 is left out, so that the format is symmetric. Each
output channel of a weight and each token of an activation has a scale of its own, amax / 127. A
weight's comes from the weight, a token's is found while the model runs, so nothing saturates:

    y = (sum of weight_qdata * act_qdata) * weight_scale * act_scale + bias

The sum is an integer and exact. The rest is float32 in this order, the one that
`torch_npu.npu_quant_matmul` documents, and is rounded once to the output's type. Rounding to codes
is half to even; `torch_npu.npu_dynamic_quant` documents round(x / scale) and scale = amax / 127.

A row of zeros has the scale 1. NaN and infinity have no code: a token that holds one gets the scale
NaN, so its whole output is NaN and is noticed. Weights that hold one are refused.

The module runs on every torch device. It is not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.errors import ConversionError

QMAX = 127

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Multiplies codes: [M, K] and [N, K] int8 → [M, N] int32, exact."""

_EXACT_TERMS = 1024
"""Products of two codes that float32 adds exactly: 1024 * 127 * 127 is below 2**24."""

_CHUNK = 1 << 24  # elements: intermediate results must not fill the device's memory


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round x / scale to codes: x [...], scale broadcastable to x → qdata [...] int8.

    Larger values saturate. NaN becomes 0, so the scale has to tell (`quantize_per_token`).
    """
    rounded = torch.round(x.float() / scale).clamp(-QMAX, QMAX)  # half to even
    return rounded.nan_to_num(nan=0.0).to(torch.int8)


def quantize_weight(weight: Tensor, scale: Tensor, name: str = "a linear") -> Tensor:
    """Quantize a linear's weights: weight [N, K], scale [N, 1] → qdata [N, K] int8.

    Args:
        name: what the weights are of, for the message.

    Raises:
        ConversionError: a weight is NaN or infinite.
    """
    if not weight.isfinite().all():
        raise ConversionError(
            f"the weights of {name} hold NaN or infinity, for which INT8 has no code: the model's "
            "files are damaged; copy them again"
        )
    return quantize(weight, scale)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token under its own scale: x [..., K] → qdata [..., K] int8, scale [..., 1]."""
    scale = token_scale(x)
    return quantize(x, scale), scale


def token_scale(x: Tensor) -> Tensor:
    """Choose each token's scale: x [..., K] → [..., 1] float32."""
    amax = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(amax == 0, 1.0, amax / QMAX)
    return torch.where(amax.isfinite(), scale, torch.nan)


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the values of codes: qdata [...] int8, scale broadcastable → [...] dtype."""
    return (qdata.float() * scale).to(dtype)


def multiply(act_qdata: Tensor, weight_qdata: Tensor) -> Tensor:
    """Multiply codes exactly on any device: [M, K] and [N, K] int8 → [M, N] int32.

    Few devices multiply integers outside libraries of their own. All multiply float32, which holds
    the sums of `_EXACT_TERMS` terms exactly, in any order.
    """
    parts = (torch.split(each, _EXACT_TERMS, dim=1) for each in (act_qdata, weight_qdata))
    total = torch.zeros(
        act_qdata.shape[0], weight_qdata.shape[0], dtype=torch.int32, device=act_qdata.device
    )
    for act, weight in zip(*parts, strict=True):
        total += (act.float() @ weight.float().t()).to(torch.int32)
    return total


def rescale(
    sums: Tensor, act_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Make outputs of a product's sums.

    sums [M, N] int32, act_scale [M, 1], weight_scale [N, 1], bias [N] → [M, N] dtype.
    """
    out = sums.float() * weight_scale.float().reshape(-1) * act_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def linear(
    x: Tensor,
    weight_qdata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    multiply_codes: Multiply = multiply,
) -> Tensor:
    """Quantize each token and multiply, in pieces of tokens that bound the memory.

    x [..., K], weight_qdata [N, K] int8, weight_scale [N, 1] float32, bias [N] → [..., N] as x.
    """
    outputs, inputs = weight_qdata.shape
    rows = x.reshape(-1, inputs)
    out = torch.empty(rows.shape[0], outputs, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK // max(outputs, inputs))
    for piece, target in zip(torch.split(rows, step), torch.split(out, step), strict=True):
        qdata, scale = quantize_per_token(piece)
        sums = multiply_codes(qdata, weight_qdata)
        target.copy_(rescale(sums, scale, weight_scale, bias, x.dtype))
    return out.view(*x.shape[:-1], outputs)


def misfits(x: Tensor) -> Tensor:
    """Count what rounding each token loses: [values that saturate, nonzero ones that become 0].

    x [..., K] → [2] int64. The first is always 0, as a token's scale fits its largest value.
    """
    rows = x.reshape(-1, x.shape[-1])
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    for piece in torch.split(rows, max(1, _CHUNK // x.shape[-1])):
        flushed = (piece.abs() > 0) & (quantize_per_token(piece)[0] == 0)
        counts[1] += flushed.sum()
    return counts
