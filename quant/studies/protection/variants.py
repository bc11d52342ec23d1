"""Build variants of a block: all of its linears quantized, or one of them, everything else exact.

A variant shares what it does not quantize with the block it is made from. In float32 passes its
products are in float32, so that what is seen is the rounding to the format and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.calibration.calibrate import weight_scale
from quant.numerics.granularity import PerToken
from quant.numerics.scaling import choose_scale
from quant.recipe.recipe import QuantRecipe
from quant.transformer.module_tree import share_tree
from quant.transformer.quantized_linear import quantized_linear


@dataclass(frozen=True, slots=True)
class BlockQuantizer:
    """Quantizes linears of blocks by a recipe's rules, whichever blocks the recipe protects.

    Attributes:
        act_scale: the static scale of each linear's input, [] float32 by its full name.
        kept: whole blocks as they were quantized, where memory holds them all; None keeps none.
    """

    recipe: QuantRecipe
    act_scale: Mapping[str, Tensor]
    kept: dict[tuple[int, tuple[str, ...]], nn.Module] | None = None

    def variant(self, index: int, block: nn.Module, names: Collection[str]) -> nn.Module:
        """Return block `index` with the linears `names`, full names, quantized."""
        key = index, tuple(names)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        variant = self._make(index, block, names)
        if self.kept is not None and len(names) > 1:
            self.kept[key] = variant
        return variant

    def _make(self, index: int, block: nn.Module, names: Collection[str]) -> nn.Module:
        def convert(name: str, module: nn.Module) -> nn.Module | None:
            full_name = f"blocks.{index}.{name}"
            if full_name not in names:
                return None
            assert isinstance(module, nn.Linear), "only linears are selected"
            return quantized_linear(
                full_name,
                module,
                self.recipe,
                weight_scale(module.weight.detach(), self.recipe),
                self._act_scale(full_name),
            )

        return share_tree(block, convert)

    def _act_scale(self, name: str) -> Tensor | None:
        if isinstance(self.recipe.act_granularity, PerToken):
            return None
        return self.act_scale[name]


def act_scales(
    recipe: QuantRecipe, amax: Mapping[str, float], binades: Mapping[str, Sequence[float]]
) -> dict[str, Tensor]:
    """Choose the scale of each linear's input as a calibration with these statistics would."""
    return {
        name: choose_scale(recipe.act_policy, torch.tensor(largest), torch.tensor(binades[name]))
        for name, largest in amax.items()
    }
