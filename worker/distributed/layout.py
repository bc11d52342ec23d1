"""How the cards of one job divide its work.

With guidance each step is two forward passes, of the prompt and of the negative prompt, that need
nothing of each other: half of the cards run the one, half the other (CFG split). The cards of a
half share the tokens (Ulysses, `quant/transformer/context_parallel.py`). Without guidance all cards
share the tokens of the one pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from worker.config import SIZE_MULTIPLE_PX, split_size
from worker.errors import ConfigError

PROMPT, NEGATIVE = 0, 1
"""The branches of guidance."""


@dataclass(frozen=True, slots=True)
class RankLayout:
    """`cfg` branches of `ulysses` cards each; a card's rank is branch * ulysses + its part."""

    world: int
    cfg: int
    ulysses: int

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2) or self.ulysses < 1 or self.cfg * self.ulysses != self.world:
            raise ValueError(
                f"{self.world} cards are not {self.cfg} branches of {self.ulysses} cards"
            )

    @classmethod
    def of(cls, world: int, guided: bool) -> Self:
        """The fastest layout: exchanges between branches are few and small."""
        cfg = 2 if guided and world % 2 == 0 else 1
        return cls(world, cfg, world // cfg)

    def branch(self, rank: int) -> int:
        """PROMPT or NEGATIVE: which forward pass a card runs where there are two branches."""
        return rank // self.ulysses

    def ulysses_ranks(self, rank: int) -> tuple[int, ...]:
        """The cards that share a branch with `rank`, and its tokens."""
        first = self.branch(rank) * self.ulysses
        return tuple(range(first, first + self.ulysses))

    def cfg_ranks(self, rank: int) -> tuple[int, ...]:
        """The cards that have the same tokens as `rank`, one of each branch."""
        return tuple(range(rank % self.ulysses, self.world, self.ulysses))

    def groups(self) -> list[tuple[int, ...]]:
        """All sets of two or more cards that exchange something, in the same order everywhere."""
        found = {self.ulysses_ranks(rank) for rank in range(self.world)}
        found |= {self.cfg_ranks(rank) for rank in range(self.world)}
        return sorted(ranks for ranks in found if len(ranks) > 1)


def check_ranks(world: int, model: Path, sizes: Sequence[str]) -> None:
    """Refuse a number of cards that a model's heads or a size's tokens do not divide by.

    Raises:
        ConfigError: naming the number, what does not divide, and what to do.
    """
    text = (model / "transformer" / "config.json").read_text(encoding="utf-8")
    heads = json.loads(text)["num_attention_heads"]
    for guided in (True, False):
        shares = RankLayout.of(world, guided).ulysses
        passes = f"{world} cards share the tokens of a pass in {shares} parts"
        if heads % shares:
            raise ConfigError(
                f"{passes}, which the model's {heads} attention heads do not divide into; start "
                "another number of processes (torchrun --nproc-per-node)."
            )
        for size in sizes:
            width, height = split_size(size)
            # Of each latent frame: any number of frames then divides, too.
            tokens = (width // SIZE_MULTIPLE_PX) * (height // SIZE_MULTIPLE_PX)
            if tokens % shares:
                raise ConfigError(
                    f"{passes}, which the {tokens} tokens of a latent frame of {size} do not "
                    "divide into; take the size out of the configuration, or start another number "
                    "of processes (torchrun --nproc-per-node)."
                )
