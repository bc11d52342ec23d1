"""Make a transformer ready to run: quantized as a recipe says, and on the kernels of its device.

What a worker calls for each of its modes. The first tree stays as it is, and every tensor that a
mode does not quantize stays shared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from quant.calibration.scales import Scales
from quant.errors import ConversionError
from quant.kernels.interface import AttentionScales, Kernels
from quant.recipe.recipe import QuantRecipe
from quant.transformer.conversion_report import ConversionReport
from quant.transformer.module_tree import share_tree
from quant.transformer.quantize import quantize_transformer
from quant.transformer.wan_block import fuse_blocks

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class PreparedTransformer(Generic[M]):
    """A transformer that is ready to run.

    Attributes:
        report: what was quantized; None where nothing was.
        unfused_blocks: blocks that run as diffusers has them, because the recipe splits what the
            kernels join (some of q, k and v, or a scale for each token).
    """

    transformer: M
    report: ConversionReport | None
    unfused_blocks: tuple[int, ...]


def prepare_transformer(
    transformer: M,
    kernels: Kernels,
    recipe: QuantRecipe | None = None,
    scales: Scales | None = None,
) -> PreparedTransformer[M]:
    """Make a twin of a BF16 `WanTransformer3DModel` that runs on `kernels`.

    Call it where the tree lies on the kernels' device, and attach hooks afterwards. The weights of
    linears that share an input are laid one behind the other, in both trees.

    Args:
        recipe: what to quantize; None for BF16.
        scales: made for it; call `quant.check_scales` first.

    Raises:
        ConversionError: the recipe does not fit, a scale is missing, the kernels cannot run what
            the recipe wants, or the tree carries hooks.
    """
    if recipe is None or scales is None:
        twin = share_tree(transformer, lambda name, module: None)
        return PreparedTransformer(twin, None, fuse_blocks(twin, kernels))
    twin, report = quantize_transformer(transformer, recipe, scales)
    left = fuse_quantized(twin, kernels, attention_scales(recipe, scales))
    return PreparedTransformer(twin, report, left)


def fuse_quantized(
    transformer: nn.Module,
    kernels: Kernels,
    attention: Mapping[int, AttentionScales],
    wait_for: Callable[[nn.Module], None] | None = None,
) -> tuple[int, ...]:
    """Put a quantized transformer on `kernels`, in place; returns the blocks left unfused.

    Args:
        wait_for: as `fuse_blocks` has it.

    Raises:
        ConversionError: a block with FP8 attention cannot be fused.
    """
    left = fuse_blocks(transformer, kernels, attention, wait_for)
    unmet = sorted(set(left) & set(attention))
    if unmet:
        raise ConversionError(
            f"FP8 attention needs fused blocks, and {len(unmet)} cannot be, the first being block "
            f"{unmet[0]}: the recipe has to quantize all or none of the linears that share an "
            "input (to_q, to_k, to_v), or use attention 'bf16'"
        )
    return left


def attention_scales(recipe: QuantRecipe, scales: Scales) -> dict[int, AttentionScales]:
    """The scales of FP8 self-attention by block; empty where the recipe has BF16 attention.

    Raises:
        ConversionError: one is missing.
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
        out = scales.act_scale[f"blocks.{block}.attn1.to_out.0"].item()
        found[block] = AttentionScales(q, k, v, out)
    return found
