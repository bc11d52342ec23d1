"""What a Wan block does between its matrix products, in plain torch and diffusers' own arithmetic.

Runs everywhere; with quantized linears it is the bit-true emulation that other kernels are held
to, because activations are rounded to HiFloat8 and stay BF16, and weights are decoded to BF16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.kernels.interface import AttentionScales, BlockLinear, Norm, Rope
from quant.kernels.joined_linear import SeparateLinears
from quant.numerics import reference
from quant.numerics.linear import Hif8Linear

P_SCALE = 2.0**-8
"""Of the softmax's numerators, which are at most 1: they reach 256, and E4M3 goes to 448."""

MOST_SCORES = 1 << 26
"""Of an emulated FP8 attention held at a time, a quarter of a GiB in float32, a few times over."""


class EagerKernels:
    """Implements `quant.kernels.interface.Kernels`."""

    name = "eager"

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return SeparateLinears(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return _DecodedLinear(linears)

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
            # As one call, which is not the same in the last bit.
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
            parts[:2] = [_turn(part, rope) for part in parts[:2]]
        if scales is None:
            return tuple(parts)
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
        self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales | None, tokens: int
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k[:, :tokens], v[:, :tokens]))
        if scales is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = fp8_attention(q, k, v, scales.out)
        return out.transpose(1, 2).flatten(2)


class _DecodedLinear(nn.Module):
    def __init__(self, linears: Sequence[Hif8Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(linears)
        self._linears = tuple(linears)
        self.act_scale = shared_act_scale(linears)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            reference.linear(x, each.weight_qdata, each.weight_scale, each.bias)
            for each in self._linears
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def shared_act_scale(linears: Sequence[Hif8Linear]) -> float:
    """The scale of the one input that linears share: the largest, which saturates for none."""
    scales = [linear.act_scale for linear in linears if linear.act_scale is not None]
    return float(torch.stack(scales).max())  # one answer of the device for all of them


def _turn(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, out_scale: float, most_scores: int = MOST_SCORES
) -> Tensor:
    """What a fused FP8 kernel computes: q, k, v [B, heads, S or T, D] bf16, rounded → as q.

    Args:
        most_scores: how many are held at a time; queries are taken in pieces for that.
    """
    keys, values = k.float().transpose(-1, -2), v.float()
    limit = torch.finfo(torch.float8_e4m3fn).max
    pieces = []
    for piece in torch.split(q, max(1, most_scores // k[..., 0].numel()), dim=-2):
        scores = piece.float() @ keys * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (weights / P_SCALE).to(torch.float8_e4m3fn).float() * P_SCALE
        out = rounded @ values / weights.sum(-1, keepdim=True)
        codes = (out / out_scale).clamp(-limit, limit).to(torch.float8_e4m3fn)
        pieces.append((codes.float() * out_scale).to(q.dtype))
    return torch.cat(pieces, dim=-2)
