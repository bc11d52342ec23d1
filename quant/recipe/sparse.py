"""Describe block-sparse self-attention: which blocks of tokens it keeps, as data of a recipe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from quant.errors import RecipeError


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """The table `[sparse]` of a recipe with `attention = "sparse"`.

    Attributes:
        share_of_mass: the share of the softmax that the kept blocks should hold, above 0 and at
            most 1. At 1 every block is kept.
        tile: frames, rows and columns of the box of tokens that a block holds.
        every_steps: after how many steps blocks are chosen again.
        dense_steps: how many steps, the first ones, attend to all tokens.
    """

    share_of_mass: float
    tile: tuple[int, int, int]
    every_steps: int
    dense_steps: int

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            RecipeError: naming the value and its bound.
        """
        if not 0 < self.share_of_mass <= 1:
            raise RecipeError(
                f"sparse share_of_mass {self.share_of_mass} is not above 0 and at most 1: 0.9 "
                "keeps the blocks that hold 90 % of the softmax"
            )
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise RecipeError(
                f"sparse tile {list(self.tile)} is not three positive numbers of frames, rows and "
                "columns of tokens, such as [2, 8, 8]"
            )
        if self.every_steps < 1 or self.dense_steps < 0:
            raise RecipeError(
                f"sparse every_steps {self.every_steps} and dense_steps {self.dense_steps} are "
                "below their bounds, 1 and 0"
            )

    @property
    def block(self) -> int:
        """Return the tokens of a block."""
        return math.prod(self.tile)

    @classmethod
    def from_table(cls, table: object) -> Self:
        """Build it from the table in TOML or JSON.

        Raises:
            RecipeError: a key is missing, unknown or of the wrong type, or out of bounds.
        """
        keys = [each.name for each in fields(cls)]
        if not isinstance(table, dict) or set(table) != set(keys):
            raise RecipeError(f"recipe table [sparse] must hold {', '.join(keys)}, not {table!r}")
        share, tile = table["share_of_mass"], table["tile"]
        if not isinstance(tile, list):
            raise RecipeError(f"sparse tile must be a list of int, not {tile!r}")
        if type(share) not in (int, float):
            raise RecipeError(f"sparse share_of_mass must be a number, not {share!r}")
        for number in (*tile, table["every_steps"], table["dense_steps"]):
            if type(number) is not int:
                raise RecipeError(f"recipe table [sparse] counts in int, not {number!r}")
        return cls(float(share), tuple(tile), table["every_steps"], table["dense_steps"])

    def to_table(self) -> dict[str, Any]:
        """Return what `from_table` reads."""
        return asdict(self) | {"tile": list(self.tile)}
