"""Run a Wan block on an NVIDIA GPU with FP8 tensor cores (compute capability 8.9 and later).

Weights are E4M3 codes of HiFloat8 values, shifted up by as many binades as E4M3's range allows.
HiFloat8 never has more than three mantissa bits, so after the shift nearly all of them are exact
(`E4m3Linear.flushed` is the share of the others). Activations come as E4M3 codes from
`quant.kernels.triton_fused`. Products are computed by `torch._scaled_mm`, with one scale per tensor
where the recipe allows it. Attention is FlashAttention-3's if the kernels are given it, otherwise
torch's own, which has none in FP8. Sparse attention is emulated, or a Triton kernel's where that
was tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quant.kernels import triton_fused, triton_recode
from quant.kernels.flash_attention import FlashAttention
from quant.kernels.int8.cuda import CudaInt8Product
from quant.kernels.interface import AttentionScales, BlockLinear
from quant.kernels.joined_linear import JoinedLinear, joined_bias
from quant.kernels.sparse import blocks, triton_attention
from quant.kernels.triton_fused import E4M3
from quant.kernels.triton_recode import E4M3_MAX
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import is_power_of_two

E4M3_LARGEST_CODE = 0x7E
MISFITS_CHUNK = 1 << 24
"""Values that are counted at once: torch widens the booleans that it sums to 8 bytes each."""


class CudaKernels:
    """Implements `quant.kernels.interface.Kernels`."""

    def __init__(self, flash: FlashAttention | None = None, *, sparse: bool = False) -> None:
        """Use `flash` for attention, or torch's if it is None.

        Args:
            sparse: compute sparse attention by `triton_attention`; otherwise emulate it.
        """
        self.flash = flash
        self._attend_blocks = (triton_attention if sparse else blocks).attend_blocks
        parts = ("FlashAttention-3",) * (flash is not None) + ("sparse attention",) * sparse
        self.name = " with ".join(filter(None, ("cuda", " and ".join(parts))))

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return JoinedLinear(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return E4m3Linear(linears)

    def int8(self, linears: Sequence[Int8Linear]) -> BlockLinear:
        return CudaInt8Product(linears)

    add_norm = staticmethod(triton_fused.add_norm)
    add_gated = staticmethod(triton_fused.add_gated)
    norm_rope = staticmethod(triton_fused.norm_rope)
    gelu = staticmethod(triton_fused.gelu)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        return x if act_scale is None else triton_fused.round_act(x, act_scale)

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        # 448 is not a HiFloat8 value, so its code means that a value exceeded E4M3's range.
        counts = torch.zeros(2, dtype=torch.int64, device=x.device)
        for chunk in torch.split(x.reshape(-1), MISFITS_CHUNK):
            magnitude = triton_fused.round_act(chunk, act_scale).view(torch.uint8) & 0x7F
            saturated = (magnitude == E4M3_LARGEST_CODE).sum()
            flushed = ((magnitude == 0) & (chunk != 0)).sum()
            counts += torch.stack((saturated, flushed))
        return counts

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        if self.flash is None:
            assert scales is None, "FP8 attention is chosen only with FlashAttention-3"
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        elif scales is None:
            out = self.flash.bf16(q, k, v)
        else:
            out = self.flash.fp8(q, k, v, scales)
        return self.round_act(out.flatten(2), act_scale)

    def sparse_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, act_scale: float | None
    ) -> Tensor:
        return self.round_act(self._attend_blocks(q, k, v, kept, block).flatten(2), act_scale)


class E4m3Linear(nn.Module):
    """Quantized linears that share their input, as one FP8 product.

    Buffers:
        weight: [N, K] E4M3.
        weight_scale: [] float32; or [1, N] if channels have their own scales, or if the ratios of
            the linears' scales are not powers of two, so that no single scale is exact for all.
        input_scale: [] float32, the scale of the shared input.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linears: Sequence[Hif8Linear]) -> None:
        super().__init__()
        qdata = [each.weight_qdata for each in linears]
        device = qdata[0].device
        rows = [part.shape[0] for part in qdata]
        weight = torch.empty(sum(rows), qdata[0].shape[1], dtype=E4M3, device=device)
        self._inexact = torch.zeros(1, dtype=torch.int32, device=device)
        outs = torch.split(weight, rows)
        self.act_scale, scales, largest = _read_scales(linears)
        common = min(scales, default=0.0)
        if scales and all(is_power_of_two(each / common) for each in scales):
            ratios = [each / common for each in scales]
            shift = _headroom([value * ratio for value, ratio in zip(largest, ratios, strict=True)])
            for part, ratio, out in zip(qdata, ratios, outs, strict=True):
                triton_recode.to_e4m3(part, ratio * 2.0**shift, out, self._inexact)
            scale = _scalar(common * 2.0**-shift, device)
        else:
            shift = _headroom(largest)
            for part, out in zip(qdata, outs, strict=True):
                triton_recode.to_e4m3(part, 2.0**shift, out, self._inexact)
            by_linear = [each.weight_scale.float() for each in linears]
            by_row = torch.cat([each.expand(n, 1) for each, n in zip(by_linear, rows, strict=True)])
            scale = (by_row * 2.0**-shift).t().contiguous()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", _scalar(self.act_scale, device))
        self.bias = joined_bias(linears)

    @property
    def flushed(self) -> float:
        """Return the share of weights that E4M3 cannot hold exactly."""
        return self._inexact.item() / self.weight.numel()

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


def _read_scales(linears: Sequence[Hif8Linear]) -> tuple[float, list[float], list[float]]:
    """Read from the device, with a single synchronization, what the joined product depends on.

    Returns:
        the scale of the linears' shared input; the weight scale of each linear, or nothing if one
        of them has several; the largest |value| among the codes of each linear.
    """
    acts = [each.act_scale.reshape(1) for each in linears if each.act_scale is not None]
    scales = [
        each.weight_scale.float().reshape(1) for each in linears if each.weight_scale.numel() == 1
    ]
    if len(scales) < len(linears):
        scales = []
    ranks = triton_recode.largest_ranks([each.weight_qdata for each in linears])
    values: list[float] = torch.cat([*acts, *scales, ranks]).tolist()
    weight_scales, largest = values[len(acts) : -len(linears)], values[-len(linears) :]
    # The largest input scale, so that the input of no linear saturates.
    return (
        max(values[: len(acts)]),
        weight_scales,
        [triton_recode.magnitude(int(rank)) for rank in largest],
    )


def _scalar(value: float, device: torch.device) -> Tensor:
    """Create a [] float32 tensor on the device, without a copy from the host to wait for."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _headroom(magnitudes: Sequence[float]) -> int:
    """Return by how many binades values can be shifted up and still fit E4M3."""
    largest = max(magnitudes)
    return math.floor(math.log2(E4M3_MAX / largest)) if largest else 0
