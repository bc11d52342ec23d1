"""Give a fused transformer the self-attention of its recipe, as far as that changes by the step."""

from __future__ import annotations

from typing import Any

from quant.recipe.recipe import QuantRecipe
from quant.transformer.attention.sparse import sparsify
from quant.transformer.attention.steps import AttentionSteps


def apply_attention(transformer: Any, recipe: QuantRecipe) -> None:
    """Let FP8 attention begin after the recipe's first steps, or make attention sparse, in place.

    Call it after `fuse_quantized`. Recipes whose attention is the same in every step change
    nothing.

    Raises:
        ConversionError: a block that is to have sparse attention is not fused.
    """
    blocks = {index: transformer.blocks[index] for index in recipe.quantized_blocks}
    if recipe.sparse is not None:
        sparsify(transformer, recipe.sparse, blocks)
    elif recipe.attention_bf16_steps:
        steps = AttentionSteps(recipe.attention_bf16_steps)
        for block in blocks.values():
            block.attends_in_bf16 = steps.is_exact
        steps.follow(transformer)
