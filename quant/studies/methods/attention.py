"""Round what self-attention multiplies to a format of eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant.numerics.scaling import choose_scale
from quant.studies.methods.formats import Format


class RoundedAttention:
    """A processor for `WanAttention`: self-attention on rounded q, k and v.

    Each of the three has one scale for a sample, chosen when the model runs. Probabilities and sums
    stay in float32, which kernels in 8 bits do not grant: this is the best that they could do.
    """

    def __init__(self, number_format: Format) -> None:
        self._format = number_format

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        _encoder_hidden_states: Tensor | None = None,
        _attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: hidden_states [B, S, K] → [B, S, K]."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = (_rotated(each, *rotary_emb) for each in (query, key))
        query, key, value = (self._rounded(each).transpose(1, 2) for each in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](mixed))  # type: ignore[no-any-return]

    def _rounded(self, x: Tensor) -> Tensor:
        amax = x.abs().amax((1, 2, 3), keepdim=True)
        return self._format.fake_quantize(x, choose_scale(self._format.policy, amax))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring channels of x [B, S, H, D] as Wan does."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.stack(turned, -1).flatten(-2).type_as(x)
