"""Select the linears that a recipe quantizes, and reject a recipe that does not fit the model.

A pattern that matches nothing, a block with another number of linears or a transformer with another
number of blocks is an error, never a smaller conversion.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from quant.errors import ConversionError
from quant.recipe.recipe import QuantRecipe


def select_linears(transformer: nn.Module, recipe: QuantRecipe) -> dict[str, nn.Linear]:
    """Return the linears that a recipe quantizes, by full name, in block order.

    Raises:
        ConversionError: the number of blocks or of linears differs from the recipe's, or a pattern
            matches nothing.
        RecipeError: the recipe's protected blocks are not known yet.
    """
    blocks = _blocks(transformer)
    recipe.check_resolved()
    if len(blocks) != recipe.total_blocks:
        raise ConversionError(
            f"recipe {recipe.name!r} is for a transformer of {recipe.total_blocks} blocks "
            f"(it protects {list(recipe.protected_blocks)}), this one has {len(blocks)}: "
            "write a recipe with total_blocks and protected_blocks for it"
        )
    found: dict[str, nn.Linear] = {}
    for index in recipe.quantized_blocks:
        found |= _select_in_block(index, blocks[index], recipe)
    for pattern in recipe.kept_linears:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConversionError(
                f"kept_linears pattern {pattern!r} of recipe {recipe.name!r} matches none of the "
                f"{len(found)} linears it would quantize: patterns are full names such as "
                f"{next(iter(found), 'blocks.0.ffn.net.2')!r}"
            )
    return {name: linear for name, linear in found.items() if not recipe.keeps(name)}


def _blocks(transformer: nn.Module) -> nn.ModuleList:
    blocks = getattr(transformer, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConversionError(
            f"{type(transformer).__name__} has no ModuleList `blocks`: recipes address the blocks "
            "of a WanTransformer3DModel"
        )
    return blocks


def _select_in_block(index: int, block: nn.Module, recipe: QuantRecipe) -> dict[str, nn.Linear]:
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    matched: dict[str, nn.Linear] = {}
    for pattern in recipe.linears:
        hits = {name: m for name, m in linears.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise ConversionError(
                f"pattern {pattern!r} of recipe {recipe.name!r} matches no linear in block "
                f"{index}, which has {', '.join(linears) or 'none'}"
            )
        matched |= hits
    if len(matched) != recipe.linears_per_block:
        raise ConversionError(
            f"recipe {recipe.name!r} implies {recipe.linears_per_block} linears per block, its "
            f"patterns match {len(matched)} in block {index}: {', '.join(matched)}"
        )
    return {f"blocks.{index}.{name}": linear for name, linear in matched.items()}


def scales_serve(made_for: QuantRecipe, recipe: QuantRecipe) -> bool:
    """Return whether scales that were made for one recipe are all that another one needs.

    Those of FP8 attention come beside those of the linears, which are the same without it.
    """
    own, wanted = made_for.calibrated, recipe.calibrated
    if wanted.attention == "bf16" and own.attention == "fp8":
        own = replace(own, attention="bf16", rotate_qk=True)
    return own.fingerprint == wanted.fingerprint
