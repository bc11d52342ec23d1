"""Run the operations of a Wan block in plain torch, with diffusers' own arithmetic.

These kernels run on every device. With quantized linears they are the bit-true emulation that other
kernels are compared with: activations are rounded to HiFloat8 and stay BF16 numbers, and weights
are decoded to BF16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.kernels.int8.product import Int8Product
from quant.kernels.interface import AttentionScales, BlockLinear, Norm, Rope
from quant.kernels.joined_linear import SeparateLinears, shared_act_scale
from quant.kernels.sparse.blocks import MAX_SCORES, attend_blocks
from quant.numerics import reference
from quant.numerics.hadamard import rotate_groups
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear

P_SCALE = 2.0**-8
"""Scale of the softmax's numerators, which are at most 1: they reach 256, E4M3's maximum is 448."""


class EagerKernels:
    """Implements `quant.kernels.interface.Kernels`."""

    name = "eager"

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return SeparateLinears(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return _DecodedLinear(linears)

    def int8(self, linears: Sequence[Int8Linear]) -> BlockLinear:
        return Int8Product(linears)

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        if delta is not None:
            x = self.add_gated(x, delta, gate)
        factor, shift = norm.factor.float(), norm.shift.float()
        if norm.plus_one:
            normed = F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps)
            normed = normed * (1 + factor.unsqueeze(1)) + shift.unsqueeze(1)
        else:
            # In one call, because separate calls differ in the last bit.
            normed = F.layer_norm(x.float(), x.shape[-1:], factor[0], shift[0], norm.eps)
        return x, self.round_act(normed.type_as(x), act_scale)

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return x + delta
        return (x.float() + delta.float() * gate.unsqueeze(1)).type_as(x)

    def norm_rope(
        self,
        x: Tensor,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm | None,
        rope: Rope | None,
        heads: int,
        scales: AttentionScales | None,
    ) -> tuple[Tensor, ...]:
        parts = list(torch.split(x, q_norm.weight.shape[0], dim=-1))
        parts[0] = q_norm(parts[0])
        if k_norm is not None:
            parts[1] = k_norm(parts[1])
        parts = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
        if rope is not None:
            parts[:2] = [rotate(part, rope) for part in parts[:2]]
        if scales is None:
            return tuple(parts)
        if scales.rotate:
            parts[:2] = [rotate_groups(part) for part in parts[:2]]
        return tuple(
            reference.fake_quantize(part, torch.tensor(scale))
            for part, scale in zip(parts, (scales.q, scales.k, scales.v), strict=True)
        )

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        return self.round_act(F.gelu(x, approximate="tanh"), act_scale)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        if act_scale is None:
            return x
        return reference.fake_quantize(x, torch.tensor(act_scale, device=x.device))

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        return reference.misfits(x, torch.tensor(act_scale, device=x.device))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attend = F.scaled_dot_product_attention if scales is None else fp8_attention
        return self.round_act(attend(q, k, v).transpose(1, 2).flatten(2), act_scale)

    def sparse_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, act_scale: float | None
    ) -> Tensor:
        return self.round_act(attend_blocks(q, k, v, kept, block).flatten(2), act_scale)


class _DecodedLinear(nn.Module):
    def __init__(self, linears: Sequence[Hif8Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self._linears = tuple(linears)
        self.act_scale = shared_act_scale(linears)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            reference.linear(x, each.weight_qdata, each.weight_scale, each.bias)
            for each in self._linears
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate pairs of channels of x [B, S, heads, D] by `rope`, in float32: → in the dtype of x."""
    cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(rotated, dim=-1).flatten(-2).type_as(x)


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, max_scores: int = MAX_SCORES) -> Tensor:
    """Emulate FlashAttention-3 in FP8: q, k, v [B, heads, S or T, D] bf16, rounded already → as q.

    Args:
        max_scores: number of scores held at a time; queries are processed in chunks for it.
    """
    keys, values = k.float().transpose(-1, -2), v.float()
    chunks = []
    for chunk in torch.split(q, max(1, max_scores // k[..., 0].numel()), dim=-2):
        scores = chunk.float() @ keys * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (weights / P_SCALE).to(torch.float8_e4m3fn).float() * P_SCALE
        chunks.append((rounded @ values / weights.sum(-1, keepdim=True)).to(q.dtype))
    return torch.cat(chunks, dim=-2)
