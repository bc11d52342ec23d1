"""Fuse the blocks of a quantized transformer onto the kernels of its device.

A worker calls `fuse_quantized` for each of its modes, once the mode's tree is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from quant.calibration.scales import Scales
from quant.errors import ConversionError
from quant.kernels.interface import AttentionScales, Kernels
from quant.numerics.hadamard import GROUP
from quant.recipe.recipe import QuantRecipe
from quant.transformer.module_tree import M, share_tree
from quant.transformer.wan_block import FusedWanBlock, fuse_blocks


def fuse_quantized(
    transformer: Any,
    kernels: Kernels,
    attention: Mapping[int, AttentionScales],
    wait_for: Callable[[nn.Module], None] | None = None,
) -> tuple[int, ...]:
    """Fuse the blocks of a transformer onto `kernels`, in place; return the blocks left unfused.

    The transformer may also be in BF16, with an empty `attention`. Call this when the tree is on
    the kernels' device, and attach hooks afterwards. Kernels may join the weights of linears that
    share an input into one tensor. The weights become views of it in every tree that shares them.

    Args:
        attention: scales of FP8 self-attention by block, from `attention_scales`.
        wait_for: see `fuse_blocks`.

    Raises:
        ConversionError: a block with FP8 attention cannot be fused, or the size of its heads is no
            multiple of `GROUP`, which FlashAttention-3 needs in FP8 as well.
    """
    _check_heads(transformer, attention)
    left = fuse_blocks(transformer, kernels, attention, wait_for)
    _check_fused(transformer, attention)
    return left


def share_fused(transformer: M, kernels: Kernels, attention: Mapping[int, AttentionScales]) -> M:
    """Make a copy of a fused transformer that shares all weights, and may attend otherwise.

    The weights are shared as the kernels hold them, and so are cached prompts. Call this before
    hooks or sparse attention are attached to `transformer`.

    Args:
        kernels: of the kind that the transformer runs on.
        attention: scales of the copy's FP8 self-attention, as for `fuse_quantized`.

    Raises:
        ConversionError: as for `fuse_quantized`, or the transformer carries hooks.
    """
    _check_heads(transformer, attention)
    copy: Any = share_tree(transformer, lambda _name, _module: None)
    for index, block in enumerate(copy.blocks):
        if isinstance(block, FusedWanBlock):
            assert type(block.kernels) is type(kernels), "products fit kernels of one kind"
            block.kernels, block.attention_scales = kernels, attention.get(index)
    _check_fused(copy, attention)
    return cast(M, copy)


def _check_heads(transformer: Any, attention: Mapping[int, AttentionScales]) -> None:
    head_size = transformer.config.attention_head_dim
    if attention and head_size % GROUP:
        raise ConversionError(
            f"FP8 attention needs heads of a multiple of {GROUP} channels, and this "
            f"transformer's have {head_size}: use attention 'bf16'"
        )


def _check_fused(transformer: Any, attention: Mapping[int, AttentionScales]) -> None:
    blocks = transformer.blocks
    unmet = [each for each in sorted(attention) if not isinstance(blocks[each], FusedWanBlock)]
    if unmet:
        raise ConversionError(
            f"FP8 attention needs fused blocks, and {len(unmet)} cannot be, the first being block "
            f"{unmet[0]}: the recipe has to quantize all or none of the linears that share an "
            "input (to_q, to_k, to_v), or use attention 'bf16'"
        )


def attention_scales(recipe: QuantRecipe, scales: Scales) -> dict[int, AttentionScales]:
    """Return the scales of FP8 self-attention by block; empty for a recipe with BF16 attention.

    Raises:
        ConversionError: a scale is missing.
    """
    if not recipe.attention_inputs:
        return {}
    known = scales.attention_scale
    missing = [name for name in recipe.attention_inputs if name not in known]
    if missing:
        raise ConversionError(
            f"the scales have none for the FP8 attention of recipe {recipe.name!r}, the first "
            f"being {missing[0]}: calibrate again with this recipe"
        )
    found = {}
    for block in recipe.quantized_blocks:
        q, k, v = (known[f"blocks.{block}.attn1.{part}"].item() for part in "qkv")
        found[block] = AttentionScales(q, k, v, recipe.rotate_qk)
    return found
