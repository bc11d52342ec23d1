"""Say what modes may combine, and refuse the rest at the start: skipped work adds up its errors.

What is not in `REFUSED` may be combined. FP8 attention and sparse attention never meet, because a
recipe has one or the other. docs/step-caches.md has the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from quant import QuantRecipe
from worker.config import ModeConfig, WorkerConfig
from worker.errors import ConfigError


class Part(StrEnum):
    """What a mode or its worker may have besides weights and rounding."""

    STEP_CACHE = "a step_cache"
    SPARSE = "sparse attention"
    SEVERAL_DEVICES = "several devices"


REFUSED: Final[Mapping[frozenset[Part], str]] = MappingProxyType(
    {
        frozenset({Part.STEP_CACHE, Part.SEVERAL_DEVICES}): (
            "each device would decide from its own part of the tokens what to skip, and wait for "
            "devices that decided otherwise; start the worker without torchrun, or take the "
            "step_cache out of the mode"
        ),
        frozenset({Part.STEP_CACHE, Part.SPARSE}): (
            "both leave work out by an estimate, and what they cost together was not measured; "
            "take the step_cache out of the mode, or a recipe without sparse attention"
        ),
    }
)
"""Pairs that are refused, with the reason and the remedy."""


def check_combinations(config: WorkerConfig, ranks: int = 1) -> None:
    """Refuse a configuration whose modes combine what does not go together.

    Args:
        ranks: the number of devices that run each job together.

    Raises:
        ConfigError: names the mode, both parts, the reason and the remedy; or the mode whose steps
            are so few that none would have the attention of its recipe.
        quant.RecipeError: a recipe cannot be read.
    """
    for mode in config.modes:
        recipe = None if mode.recipe is None else QuantRecipe.load(mode.recipe)
        parts = _parts(mode, recipe, ranks)
        for pair, reason in REFUSED.items():
            if pair <= parts:
                raise ConfigError(
                    f"Mode {mode.name!r} has {' and '.join(sorted(pair))}, which do not go "
                    f"together: {reason}."
                )
        exact = 0 if recipe is None else recipe.exact_attention_steps
        steps = config.model.offer(fingerprint="unread").terms(mode).default_steps
        if recipe is not None and steps <= exact:
            key = "dense_steps" if recipe.sparse else "attention_bf16_steps"
            raise ConfigError(
                f"Mode {mode.name!r} has {recipe.attention} attention after the first {exact} "
                f"steps, and its jobs have {steps} by default, so that none would have it: lower "
                f"{key} in the recipe {mode.recipe!r}, or take one with attention 'bf16'."
            )


def _parts(mode: ModeConfig, recipe: QuantRecipe | None, ranks: int) -> set[Part]:
    has = {
        Part.STEP_CACHE: mode.step_cache is not None,
        Part.SPARSE: recipe is not None and recipe.sparse is not None,
        Part.SEVERAL_DEVICES: ranks > 1,
    }
    return {part for part, present in has.items() if present}
