"""Keep the evidence for protected blocks: what an analysis measured, in short.

A recipe with `protect = "auto"` leaves its protected blocks to an analysis. The scales file that is
calibrated with it holds this evidence, so that whoever loads the scales knows the blocks and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from quant.errors import RecipeError
from quant.recipe.recipe import QuantRecipe


@dataclass(frozen=True, slots=True)
class BlockEnergy:
    """The error energy of one block quantized alone, as a share of the velocity's.

    Attributes:
        low, high: bounds of its 95 % interval over prompts.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ProtectionEvidence:
    """Which blocks an analysis proposes, and what they were chosen by.

    Attributes:
        model_fingerprint: of the model that was analyzed.
        recipe: fingerprint of what was measured (`measured_recipe`).
        blocks: the proposed ones, ascending.
        energy: of each block, in order.
        budget: what limits the set, by its name, such as {"count": 5}.
        prompts, points: how many the energies were measured on.
        prompts_file: for people; prompts_sha256 identifies the set.
        points_sha256: of all that the points were recorded from: model, prompts, sampler, steps.
        analysis_sha256: of the analysis' results.json.
        options: of the analysis, and its device.
        tool_version: of the tool that analyzed.
    """

    model_fingerprint: str
    recipe: str
    blocks: tuple[int, ...]
    energy: tuple[BlockEnergy, ...]
    budget: Mapping[str, float]
    prompts: int
    points: int
    prompts_file: str
    prompts_sha256: str
    points_sha256: str
    analysis_sha256: str
    options: Mapping[str, Any]
    tool_version: str

    def __post_init__(self) -> None:
        """Check that the blocks are among those measured.

        Raises:
            ValueError: one is not, or they do not ascend.
        """
        outside = [block for block in self.blocks if not 0 <= block < len(self.energy)]
        if outside or list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks {list(self.blocks)} are not some of {len(self.energy)}")

    @property
    def ranking(self) -> tuple[int, ...]:
        """Return all blocks, the one with the most error energy first."""
        return tuple(sorted(range(len(self.energy)), key=lambda b: (-self.energy[b].mean, b)))

    @property
    def removed(self) -> float:
        """Return the share of the sum of all blocks' energies that the protected ones have."""
        total = sum(each.mean for each in self.energy)
        return sum(self.energy[block].mean for block in self.blocks) / total if total else 0.0

    def resolve(self, recipe: QuantRecipe) -> QuantRecipe:
        """Return a recipe with `protect = "auto"` with these blocks; another one as it is.

        Raises:
            RecipeError: the analysis was of another format, other scales, other linears (kept ones
                too), or of another number of blocks.
        """
        if not recipe.is_auto:
            return recipe
        resolved = recipe.resolved(len(self.energy), self.blocks)
        if measured_recipe(resolved, len(self.energy)).fingerprint != self.recipe:
            raise RecipeError(
                f"the analysis measured another format, other scales or other linears than those "
                f"of recipe {recipe.name!r}: analyze the model with --recipe "
                f"{recipe.source or recipe.name}"
            )
        return resolved

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the text is something else.
        """
        data = json.loads(text)
        if unknown := set(data) - {each.name for each in fields(cls)}:
            raise ValueError(f"the evidence for protected blocks has unknown {min(unknown)!r}")
        energy = tuple(BlockEnergy(**each) for each in data.pop("energy"))
        return cls(**data | {"blocks": tuple(data["blocks"]), "energy": energy})


def measured_recipe(recipe: QuantRecipe, total_blocks: int) -> QuantRecipe:
    """Return what an analysis measures of a recipe: its linears in every block, BF16 attention.

    Linears that it keeps in BF16 stay so: the ranking is of the model as it would serve.
    """
    return replace(
        recipe,
        protect="",
        total_blocks=total_blocks,
        protected_blocks=(),
        attention="bf16",
        rotate_qk=True,
        attention_bf16_steps=0,
        sparse=None,
    )
