"""A block of Wan's transformer with as few trips through memory as its kernels allow.

Takes the place of a diffusers `WanTransformerBlock` in its tree: same arguments, same arithmetic.
Queries, keys and values are one product, norms are written once in the form the next product takes,
and what cross-attention makes of the prompt is kept for as long as the prompt's tensor lives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm, Rope
from quant.numerics.linear import Hif8Linear


class FusedWanBlock(nn.Module):
    """One transformer block on the kernels it is given."""

    def __init__(
        self, block: Any, kernels: Kernels, attention: AttentionScales | None = None
    ) -> None:
        """Take over a block's weights.

        Args:
            block: a `WanTransformerBlock`, whose linears may be `Hif8Linear`s.
            attention: scales of FP8 self-attention; None for BF16.
        """
        super().__init__()
        self.kernels = kernels
        self.attention_scales = attention
        # Apart from cross-attention's, because over several cards it is another one.
        self.self_attention = kernels.attention
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
        self._prompts: Any = WeakIdKeyDictionary()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Rope,
    ) -> Tensor:
        """hidden_states [B, S, K] bf16, encoder_hidden_states [B, T, K], temb [B, 6, K]."""
        kernels = self.kernels
        hidden_states = hidden_states.contiguous()  # as kernels read it
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
        scales = self.attention_scales
        q, k, v = self.kernels.norm_rope(
            self.qkv(normed), self.own_q_norm, self.own_k_norm, rope, self.heads, scales
        )
        out = self.self_attention(q, k, v, scales, q.shape[1])
        if scales is None:
            out = self.kernels.round_act(out, self.own_out.act_scale)
        return self.own_out(out)

    def _cross_attention(self, normed: Tensor, prompt: Tensor) -> Tensor:
        kernels = self.kernels
        (q,) = kernels.norm_rope(
            self.cross_q(normed), self.cross_q_norm, None, None, self.heads, None
        )
        k, v = self._prompt_kv(prompt)
        out = kernels.attention(q, k, v, None, k.shape[1])
        return self.cross_out(kernels.round_act(out, self.cross_out.act_scale))

    def _prompt_kv(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        if prompt not in self._prompts:
            rounded = self.kernels.round_act(prompt, self.cross_kv.act_scale)
            k, v = self.cross_kv(rounded).chunk(2, dim=-1)
            # Copies: a view of the product would keep all of it.
            kept = (self.cross_k_norm(k), v.contiguous())
            self._prompts[prompt] = tuple(x.unflatten(-1, (self.heads, -1)) for x in kept)
        k, v = self._prompts[prompt]
        return k, v


def fuse_blocks(
    transformer: Any,
    kernels: Kernels,
    attention: Mapping[int, AttentionScales] | None = None,
    wait_for: Callable[[nn.Module], None] | None = None,
) -> tuple[int, ...]:
    """Replace the blocks of a `WanTransformer3DModel`, in place, and let it keep prompts.

    Blocks that cannot be fused stay as they are: those of a recipe that quantizes only some of the
    linears that share an input, or rounds each token on its own.

    Args:
        attention: scales of FP8 self-attention by block; the others run it in BF16.
        wait_for: returns when a block's weights are there, if they may still be on their way.

    Returns:
        the blocks that were left.
    """
    left = []
    for index, block in enumerate(transformer.blocks):
        if wait_for is not None:
            wait_for(block)
        if _fits(block):
            scales = (attention or {}).get(index)
            transformer.blocks[index] = FusedWanBlock(block, kernels, scales)
        else:
            left.append(index)
    embedder = transformer.condition_embedder
    embedder.text_embedder = _KeptText(embedder.text_embedder)
    return tuple(left)


def _fits(block: Any) -> bool:
    own, cross = block.attn1, block.attn2
    for group in ([own.to_q, own.to_k, own.to_v], [cross.to_k, cross.to_v]):
        if len({type(each) for each in group}) > 1:
            return False
    linears = [each for each in block.modules() if isinstance(each, Hif8Linear)]
    return all(each.act_scale is not None for each in linears)


def _linear(kernels: Kernels, linears: Sequence[nn.Module]) -> BlockLinear:
    quantized = [each for each in linears if isinstance(each, Hif8Linear)]
    if quantized:
        return kernels.quantized(quantized)
    return kernels.plain([each for each in linears if isinstance(each, nn.Linear)])


class _KeptText(nn.Module):
    """Embeds each prompt once: the same tensor in gives the same tensor out, while it lives."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self._kept: Any = WeakIdKeyDictionary()

    def forward(self, prompt: Tensor) -> Tensor:
        if prompt not in self._kept:
            self._kept[prompt] = self.embedder(prompt)
        kept: Tensor = self._kept[prompt]
        return kept
