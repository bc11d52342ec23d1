"""Divide one job's work over ranks.

With guidance each step has two independent forward passes, one of the prompt and one of the
negative prompt. Half of the ranks run one pass and half the other (CFG parallelism). The ranks of a
half split the tokens (Ulysses, `quant/transformer/context_parallel.py`). Without guidance all ranks
split the tokens of the single pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jobs.geometry import parse_size, tokens_per_frame
from worker.errors import ConfigError

PROMPT, NEGATIVE = 0, 1
"""The two branches of classifier-free guidance (CFG)."""


@dataclass(frozen=True, slots=True)
class RankLayout:
    """`cfg` branches of `ulysses` ranks each; rank = branch * ulysses + index of its token part."""

    world: int
    cfg: int
    ulysses: int

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2) or self.ulysses < 1 or self.cfg * self.ulysses != self.world:
            raise ValueError(
                f"{self.world} ranks are not {self.cfg} branches of {self.ulysses} ranks"
            )

    @classmethod
    def of(cls, world: int, guided: bool) -> Self:
        """Return the fastest layout: CFG first, as exchanges between branches are few and small."""
        cfg = 2 if guided and world % 2 == 0 else 1
        return cls(world, cfg, world // cfg)

    def branch(self, rank: int) -> int:
        """Return PROMPT or NEGATIVE, the forward pass of `rank` where there are two branches."""
        return rank // self.ulysses

    def ulysses_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that split the tokens of a branch with `rank`."""
        first = self.branch(rank) * self.ulysses
        return tuple(range(first, first + self.ulysses))

    def cfg_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that have the same tokens as `rank`, one of each branch."""
        return tuple(range(rank % self.ulysses, self.world, self.ulysses))

    def groups(self) -> list[tuple[int, ...]]:
        """Return all sets of ranks that exchange tensors, in the same order on every rank."""
        found = {self.ulysses_ranks(rank) for rank in range(self.world)}
        found |= {self.cfg_ranks(rank) for rank in range(self.world)}
        return sorted(ranks for ranks in found if len(ranks) > 1)


def check_ranks(world: int, model: Path, sizes: Sequence[str]) -> None:
    """Refuse a number of ranks that a model's heads or a size's tokens are not divisible by.

    Raises:
        ConfigError: names the number, what it does not divide, and the remedy.
    """
    text = (model / "transformer" / "config.json").read_text(encoding="utf-8")
    heads = json.loads(text)["num_attention_heads"]
    for guided in (True, False):
        shares = RankLayout.of(world, guided).ulysses
        passes = f"{world} ranks share the tokens of a pass in {shares} parts"
        if heads % shares:
            raise ConfigError(
                f"{passes}, which the model's {heads} attention heads do not divide into; start "
                "another number of processes (torchrun --nproc-per-node)."
            )
        for size in sizes:
            # Of one latent frame: then those of any number of frames are divisible as well.
            tokens = tokens_per_frame(*parse_size(size))
            if tokens % shares:
                raise ConfigError(
                    f"{passes}, which the {tokens} tokens of a latent frame of {size} do not "
                    "divide into; take the size out of the configuration, or start another number "
                    "of processes (torchrun --nproc-per-node)."
                )
