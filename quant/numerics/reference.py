"""Implement quantized linear algebra in plain torch, the reference for every other kernel.

Everything is defined as float32 arithmetic around `quant.numerics.hif8`. On the CPU most of it is
one table look-up, for two reasons. BF16 has 65,536 values, so scaling, rounding to HiFloat8 and
scaling back is a gather. A byte has 256 codes, so two neighbouring weights are one of 65,536 pairs,
decoded to two BF16 values by one gather. The tables are filled by the arithmetic they replace.

The module runs on every torch device. It is not differentiable, and not optimized for devices other
than the CPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.numerics import hif8
from quant.numerics.scaling import ScalePolicy, choose_scale, is_power_of_two

_CHUNK = 1 << 24  # elements: intermediate results must not fill the device's memory


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize x under a scale: x [...], scale broadcastable to x → qdata [...] uint8."""
    if x.dtype is torch.bfloat16 and scale.numel() == 1 and is_power_of_two(scale.item()):
        return hif8.encode(
            x * (1 / scale).to(x.dtype)
        )  # exact, and encoding BF16 is faster than FP32
    return hif8.encode(x.float() / scale)


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Dequantize codes under a scale: qdata [...] uint8, scale broadcastable → [...] dtype."""
    even = qdata.numel() % 2 == 0 and qdata.storage_offset() % 2 == 0
    in_pairs = even and qdata.is_contiguous()
    if dtype is torch.bfloat16 and qdata.device.type == "cpu" and in_pairs:
        if scale.numel() > 1:
            return (_decode_pairs(qdata, 1.0) * scale).to(dtype)
        if is_power_of_two(scale.item()):
            return _decode_pairs(qdata, scale.item())
    return (hif8.decode(qdata, torch.float32) * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize and dequantize at once: x [...], scale broadcastable → [...] in x's dtype."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and scale.numel() == 1:
        multiplier = scale.item()
        if is_power_of_two(multiplier):
            table = _fake_quantize_table(multiplier)
            return table.index_select(0, hif8.bf16_index(x)).view(x.shape)
    if scale.numel() == 1 and x.numel() > _CHUNK:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        chunks = (torch.split(each.reshape(-1), _CHUNK) for each in (x, out))
        for chunk, target in zip(*chunks, strict=True):
            target.copy_(_fake_quantize(chunk, scale.reshape(())))
        return out
    return _fake_quantize(x, scale)


def _fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    return (hif8.round_to_hif8(x.float() / scale) * scale).to(x.dtype)


def fake_quantize_per_token(x: Tensor, policy: ScalePolicy) -> Tensor:
    """Fake-quantize each token under a scale from its own amax: x [..., K] → [..., K]."""
    return fake_quantize(x, choose_scale(policy, x.abs().amax(-1, keepdim=True)))


def misfits(x: Tensor, scale: Tensor) -> Tensor:
    """Count the values of x [..., K] that saturate and the nonzero ones that become 0: [2] int64.

    Args:
        scale: [], or [..., 1] with one for each token.
    """
    rows = x.reshape(-1, x.shape[-1])
    scales = scale.reshape(-1, 1).expand(rows.shape[0], 1)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK // x.shape[-1])
    for chunk, row_scale in zip(torch.split(rows, step), torch.split(scales, step), strict=True):
        magnitude = chunk.abs().float()
        saturated = magnitude > hif8.LARGEST * row_scale
        flushed = (magnitude < hif8.FLUSHED_BELOW * row_scale) & (magnitude > 0)
        counts += torch.stack((saturated.sum(), flushed.sum()))
    return counts


def linear(x: Tensor, weight_qdata: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply fake-quantized activations by quantized weights, in the dtype of x.

    x [..., K], weight_qdata [N, K] uint8, weight_scale [] or [N, 1] float32, bias [N] → [..., N].
    """
    return product(x, dequantize(weight_qdata, weight_scale, x.dtype), bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear`: x [..., K], weight [N, K], bias [N] of one dtype → [..., N] in it.

    On a CPU without BF16 instructions, the sums are in FP32 and rounded once, as on CPUs with such
    instructions. torch's own implementation there takes ten times as long (docs/log.md).
    """
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or _multiplies_bf16():
        return F.linear(x, weight, bias)
    fp32_bias = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), fp32_bias).to(x.dtype)


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _decode_pairs(qdata: Tensor, multiplier: float) -> Tensor:
    index = qdata.reshape(-1).view(torch.uint16).to(torch.int32)
    pairs = _pair_table(multiplier).index_select(0, index)
    return pairs.view(torch.bfloat16).view(qdata.shape)


@lru_cache(maxsize=128)
def _fake_quantize_table(multiplier: float) -> Tensor:
    """Return `fake_quantize` of every BF16 value: [65536] bf16, 128 KiB per multiplier."""
    scaled = hif8.all_bf16().float() / multiplier
    return (hif8.round_to_hif8(scaled) * multiplier).to(torch.bfloat16)


@lru_cache(maxsize=128)
def _pair_table(multiplier: float) -> Tensor:
    """Return two dequantized BF16 values as one int32 for every pair of codes: [65536], 256 KiB."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    values = hif8.decode(pairs, torch.float32) * multiplier
    return values.to(torch.bfloat16).view(torch.int32)
