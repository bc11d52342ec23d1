"""Run a block of Wan's transformer with as few memory passes as its kernels allow.

A `FusedWanBlock` replaces a diffusers `WanTransformerBlock` in its tree, with the same arguments
and the same arithmetic. Queries, keys and values are computed by one matrix product. The output of
a norm is written once, in the form that the next product reads. The keys and values that
cross-attention computes from the prompt are cached as long as the prompt's tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm, Rope
from quant.kernels.joined_linear import GridProduct
from quant.numerics.grid_linear import GridLinear
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear
from quant.transformer.prefetch import decode_ahead

Attention = Callable[[Tensor, Tensor, Tensor, AttentionScales | None, float | None], Tensor]
"""The signature of `quant.kernels.interface.Kernels.attention`."""


def _unwrapped(attention: Attention) -> Attention:
    return attention


def _dense(kernels: Kernels) -> Attention:
    return kernels.attention


def _never() -> bool:
    return False


class FusedWanBlock(nn.Module):
    """A transformer block that runs on the kernels it is given."""

    def __init__(
        self, block: Any, kernels: Kernels, attention: AttentionScales | None = None
    ) -> None:
        """Take over the weights of a block.

        Args:
            block: a `WanTransformerBlock`; its linears may be `Hif8Linear`s, `GridLinear`s or
                `Int8Linear`s.
            attention: scales of FP8 self-attention; None for BF16.
        """
        super().__init__()
        self.kernels = kernels
        self.attention_scales = attention
        # `quant.transformer.attention` replaces it where FP8 attention begins after some steps.
        self.attends_in_bf16: Callable[[], bool] = _never
        # Sparse attention replaces it, to leave out some of the keys.
        self.self_attention: Callable[[Kernels], Attention] = _dense
        # Context parallelism replaces it, to exchange tokens for heads around the attention.
        self.wrap_attention: Callable[[Attention], Attention] = _unwrapped
        own, cross = block.attn1, block.attn2
        self.heads = own.heads
        self.qkv = _linear(kernels, [own.to_q, own.to_k, own.to_v])
        self.own_out = _linear(kernels, [own.to_out[0]])
        self.own_q_norm: nn.RMSNorm = own.norm_q
        self.own_k_norm: nn.RMSNorm = own.norm_k
        self.cross_q = _linear(kernels, [cross.to_q])
        self.cross_kv = _linear(kernels, [cross.to_k, cross.to_v])
        self.cross_out = _linear(kernels, [cross.to_out[0]])
        self.cross_q_norm: nn.RMSNorm = cross.norm_q
        self.cross_k_norm: nn.RMSNorm = cross.norm_k
        self.up = _linear(kernels, [block.ffn.net[0].proj])
        self.down = _linear(kernels, [block.ffn.net[2]])
        self.norm2 = block.norm2
        self.eps = block.norm1.eps
        self.scale_shift_table = block.scale_shift_table
        self._cached_kv: Any = WeakIdKeyDictionary()

    @property
    def products(self) -> tuple[BlockLinear, ...]:
        """The products in the order in which every pass computes them.

        The keys and values of a prompt are left out, because they are computed once.
        """
        return (self.qkv, self.own_out, self.cross_q, self.cross_out, self.up, self.down)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Rope,
    ) -> Tensor:
        """Run the block.

        Inputs: hidden_states [B, S, K] bf16, encoder_hidden_states [B, T, K], temb [B, 6, K].
        """
        kernels = self.kernels
        hidden_states = hidden_states.contiguous()  # kernels require it
        modulation = self.scale_shift_table + temb.float()
        shift, factor, gate, ffn_shift, ffn_factor, ffn_gate = modulation.unbind(1)

        norm = Norm(factor, shift, self.eps, plus_one=True)
        x, normed = kernels.add_norm(hidden_states, None, None, norm, self.qkv.act_scale)
        attended = self._self_attention(normed, rotary_emb)
        norm = Norm(self.norm2.weight[None], self.norm2.bias[None], self.norm2.eps, plus_one=False)
        x, normed = kernels.add_norm(x, attended, gate, norm, self.cross_q.act_scale)
        attended = self._cross_attention(normed, encoder_hidden_states)
        norm = Norm(ffn_factor, ffn_shift, self.eps, plus_one=True)
        x, normed = kernels.add_norm(x, attended, None, norm, self.up.act_scale)
        widened = kernels.gelu(self.up(normed), self.down.act_scale)
        return kernels.add_gated(x, self.down(widened), ffn_gate)

    def _self_attention(self, normed: Tensor, rope: Rope) -> Tensor:
        scales = None if self.attends_in_bf16() else self.attention_scales
        q, k, v = self.kernels.norm_rope(
            self.qkv(normed), self.own_q_norm, self.own_k_norm, rope, self.heads, scales
        )
        attention = self.wrap_attention(self.self_attention(self.kernels))
        return self.own_out(attention(q, k, v, scales, self.own_out.act_scale))

    def _cross_attention(self, normed: Tensor, prompt: Tensor) -> Tensor:
        kernels = self.kernels
        (q,) = kernels.norm_rope(
            self.cross_q(normed), self.cross_q_norm, None, None, self.heads, None
        )
        k, v = self._prompt_kv(prompt)
        return self.cross_out(kernels.attention(q, k, v, None, self.cross_out.act_scale))

    def _prompt_kv(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        if prompt not in self._cached_kv:
            rounded = self.kernels.round_act(prompt, self.cross_kv.act_scale)
            k, v = self.cross_kv(rounded).chunk(2, dim=-1)
            # Copies, because a view would keep the whole product in memory.
            cached = (self.cross_k_norm(k), v.contiguous())
            self._cached_kv[prompt] = tuple(x.unflatten(-1, (self.heads, -1)) for x in cached)
        k, v = self._cached_kv[prompt]
        return k, v


def fuse_blocks(
    transformer: Any,
    kernels: Kernels,
    attention: Mapping[int, AttentionScales] | None = None,
    wait_for: Callable[[nn.Module], None] | None = None,
) -> tuple[int, ...]:
    """Replace the blocks of a `WanTransformer3DModel` by fused ones, in place.

    Its embedded prompts are cached as well. A block stays a diffusers block if it cannot be fused:
    if the recipe quantizes only some of the linears that share an input (some of q, k and v), or
    rounds each token to HiFloat8 under its own scale.

    Where products decode their weights, each decodes those of the next one, also of the next
    block's first, while it multiplies (`quant.transformer.prefetch`).

    Args:
        attention: scales of FP8 self-attention by block; the other blocks run it in BF16.
        wait_for: called with each block; returns when the block's weights are loaded.

    Returns:
        the indices of the blocks that were not fused.
    """
    left = []
    for index, block in enumerate(transformer.blocks):
        if wait_for is not None:
            wait_for(block)
        if _can_fuse(block):
            scales = (attention or {}).get(index)
            transformer.blocks[index] = FusedWanBlock(block, kernels, scales)
        else:
            left.append(index)
    fused = [block for block in transformer.blocks if isinstance(block, FusedWanBlock)]
    decode_ahead([product for block in fused for product in block.products])
    embedder = transformer.condition_embedder
    embedder.text_embedder = _CachedTextEmbedder(embedder.text_embedder)
    return tuple(left)


def _can_fuse(block: Any) -> bool:
    own, cross = block.attn1, block.attn2
    for group in ([own.to_q, own.to_k, own.to_v], [cross.to_k, cross.to_v]):
        if len({type(each) for each in group}) > 1:
            return False
    linears = [each for each in block.modules() if isinstance(each, Hif8Linear | GridLinear)]
    return all(each.act_scale is not None for each in linears)


def _linear(kernels: Kernels, linears: Sequence[nn.Module]) -> BlockLinear:
    quantized = [each for each in linears if isinstance(each, Hif8Linear)]
    if quantized:
        return kernels.quantized(quantized)
    int8 = [each for each in linears if isinstance(each, Int8Linear)]
    if int8:
        return kernels.int8(int8)
    decoded = [each for each in linears if isinstance(each, GridLinear)]
    if decoded:
        return GridProduct(kernels, decoded)
    return kernels.plain([each for each in linears if isinstance(each, nn.Linear)])


class _CachedTextEmbedder(nn.Module):
    """A text embedder that embeds each prompt tensor once and returns the same result again.

    A result is cached as long as the prompt's tensor exists.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self._cached: Any = WeakIdKeyDictionary()

    def forward(self, prompt: Tensor) -> Tensor:
        if prompt not in self._cached:
            self._cached[prompt] = self.embedder(prompt)
        embedded: Tensor = self._cached[prompt]
        return embedded
