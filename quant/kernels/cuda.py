"""A Wan block on an NVIDIA card with FP8 tensor cores (compute capability 8.9 and later).

Weights are E4M3 codes of HiFloat8 values, shifted up as far as E4M3 reaches: HiFloat8 never has
more than three mantissa bits, so the shift makes nearly all of them exact (`E4m3Linear.flushed`
counts the rest). Activations come as E4M3 codes from `quant.kernels.fused`. Products are
`torch._scaled_mm`, where the recipe allows with one scale per tensor. Attention is torch's own in
BF16 and cuDNN's in FP8 (`quant.kernels.cudnn_fp8`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quant import hif8
from quant.kernels import fused
from quant.kernels.eager import shared_act_scale
from quant.kernels.fused import E4M3
from quant.kernels.interface import AttentionScales, BlockLinear
from quant.kernels.plain import JoinedLinear, joined_bias
from quant.linear import Hif8Linear
from quant.scaling import is_power_of_two

if TYPE_CHECKING:
    from quant.kernels.cudnn_fp8 import Fp8Attention

E4M3_MAX = 448.0
E4M3_LARGEST_CODE = 0x7E
_AT_ONCE = 1 << 26  # codes: what is between them and E4M3 takes 256 MiB


class CudaKernels:
    """Implements `quant.kernels.interface.Kernels`."""

    name = "cuda"

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return JoinedLinear(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return E4m3Linear(linears)

    add_norm = staticmethod(fused.add_norm)
    add_gated = staticmethod(fused.add_gated)
    norm_rope = staticmethod(fused.norm_rope)
    gelu = staticmethod(fused.gelu)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        return x if act_scale is None else fused.round_act(x, act_scale)

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        # HiFloat8 has no 448, so that code says that a value lay beyond E4M3.
        magnitude = fused.round_act(x, act_scale).view(torch.uint8) & 0x7F
        saturated = (magnitude == E4M3_LARGEST_CODE).sum()
        flushed = ((magnitude == 0) & (x != 0)).sum()
        return torch.stack((saturated, flushed))

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales | None, tokens: int
    ) -> Tensor:
        if scales is not None:
            return self._fp8_attention(q, k, v, scales, tokens).flatten(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k[:, :tokens], v[:, :tokens]))
        out = scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    @cached_property
    def _fp8_attention(self) -> Fp8Attention:
        # Only where a recipe wants it: it needs `nvidia-cudnn-frontend`, which not everybody has.
        from quant.kernels.cudnn_fp8 import Fp8Attention  # noqa: PLC0415

        return Fp8Attention()


class E4m3Linear(nn.Module):
    """Quantized linears that share their input, as one FP8 product.

    Buffers:
        weight: [N, K] E4M3.
        weight_scale: [] float32; or [1, N], where channels have their own or the linears' scales
            are not powers of two apart, so that no one scale serves all exactly.

    Attributes:
        flushed: the share of weights that E4M3 cannot hold exactly.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linears: Sequence[Hif8Linear]) -> None:
        super().__init__()
        self.act_scale = shared_act_scale(linears)
        device = linears[0].weight_qdata.device
        parts = [each.weight_scale.float() for each in linears]
        if _one_scale_serves(parts):
            scale = torch.stack(parts).min()
            ratios = [float(part / scale) for part in parts]
        else:
            rows = [each.out_features for each in linears]
            scale = torch.cat([p.expand(n, 1) for p, n in zip(parts, rows, strict=True)])
            ratios = [1.0] * len(parts)
        largest = [_largest_value(each.weight_qdata) for each in linears]
        shifted = max(value * ratio for value, ratio in zip(largest, ratios, strict=True))
        scale = scale * 2.0 ** -_headroom(shifted)
        codes, inexact = [], 0
        start = 0
        for each, part in zip(linears, parts, strict=True):
            own = scale if scale.dim() == 0 else scale[start : start + each.out_features]
            start += each.out_features
            code, wrong = _as_e4m3(each.weight_qdata, part / own)
            codes.append(code)
            inexact += wrong
        weight = torch.cat(codes)
        self.flushed = inexact / weight.numel()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.t().contiguous() if scale.dim() else scale)
        self.register_buffer("input_scale", torch.tensor(self.act_scale, device=device))
        self.bias = joined_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        input_scale = self.input_scale
        if self.weight_scale.dim():
            input_scale = input_scale.expand(rows.shape[0], 1).contiguous()
        out = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], -1)


def _one_scale_serves(scales: Sequence[Tensor]) -> bool:
    """Whether all are single, and powers of two apart: then codes can be shifted to one of them."""
    if any(scale.numel() > 1 for scale in scales):
        return False
    return all(is_power_of_two(float(scale / scales[0])) for scale in scales)


def _headroom(largest: float) -> int:
    """How many binades values up to `largest` can be shifted up and still fit E4M3."""
    return math.floor(math.log2(E4M3_MAX / largest)) if largest else 0


def _largest_value(qdata: Tensor) -> float:
    # Without the sign, codes are not in the order of their values: look at the few there are.
    present = torch.bincount(qdata.reshape(-1), minlength=256).cpu() > 0
    values = hif8.code_values().abs()
    return values[present & values.isfinite()].max().item() if present.any() else 0.0


def _as_e4m3(qdata: Tensor, factor: Tensor) -> tuple[Tensor, int]:
    """Codes times a factor (or one per row) as E4M3, and how many are not exact.

    A code has 256 values, so with one factor this is a table of bytes and a gather.
    """
    out = torch.empty(qdata.shape, dtype=E4M3, device=qdata.device)
    if factor.numel() == 1:
        values = hif8.code_values().to(qdata.device) * factor.reshape(())
        table = values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        flat, into = qdata.reshape(-1), out.view(torch.uint8).reshape(-1)
        for start in range(0, flat.numel(), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            into[part] = table.view(torch.uint8)[flat[part].to(torch.int32)]
        counts = torch.bincount(flat, minlength=256)
        return out, int(counts[table.float() != values].sum())
    wrong = 0
    rows = max(1, _AT_ONCE // qdata.shape[1])
    for start in range(0, qdata.shape[0], rows):
        part = slice(start, start + rows)
        value = hif8.decode(qdata[part], torch.float32) * factor[part]
        out[part] = value.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        wrong += int((out[part].float() != value).sum())
    return out, wrong
