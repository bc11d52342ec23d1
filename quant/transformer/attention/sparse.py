"""Run a transformer's self-attention over some blocks of its tokens (`attention = "sparse"`).

Tokens go through the blocks of the transformer in tile order: box by box of some frames, rows and
columns, so that neighbours in the sequence are neighbours in the video. Each forward pass puts them
in this order once, and their rotary angles as well, and undoes it at the end. Where a grid is no
multiple of the box, boxes at its edges are smaller, and the blocks behind them hold parts of two.

Blocks are chosen for each head, anew after some steps, and separately for each prompt: with
guidance a step has two passes, whose attention differs. What is kept between steps belongs to a
run (`quant.transformer.attention.steps`). Outside of a run each pass chooses for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.errors import ConversionError
from quant.kernels.interface import AttentionScales, Kernels
from quant.kernels.sparse.blocks import choose_blocks, density, sample_mass
from quant.recipe.sparse import SparseSettings
from quant.transformer.attention.steps import AttentionSteps, attention_steps_of
from quant.transformer.wan_block import Attention, FusedWanBlock

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens."""


@dataclass(frozen=True, slots=True)
class SparseShares:
    """What sparse attention kept, on average over its passes, 0 to 1.

    Attributes:
        density: of all scores.
        mass: of the softmax, measured on a few queries when blocks are chosen (`sample_mass`).
    """

    density: float
    mass: float


class SparseAttention(AttentionSteps):
    """The sparse self-attention of one transformer: settings, steps, and counts.

    A branch keeps, by block of the transformer, the step of the choice, the choice, and its density
    and mass in that step, [2].

    Attributes:
        order: the row-major number of each token in tile order, [S] int64, from `order_tokens`.
        inverse: the place of each token in that order, [S] int64.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, settings: SparseSettings) -> None:
        super().__init__(settings.dense_steps)
        self.settings = settings
        self._ordered: tuple[Grid, torch.device] | None = None
        self._sums: Tensor | None = None
        self._passes = 0

    def __str__(self) -> str:
        return f"sparse self-attention, {self.settings.share_of_mass:g} of the softmax"

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count steps and keep choices within the context, and the shares until the next one."""
        self._sums, self._passes = None, 0
        with super().run():
            yield

    def shares(self) -> SparseShares | None:
        """Compute the shares of the last run; None if all of its attention was dense."""
        if self._sums is None:
            return None
        # Sums of float32 may exceed 1 in their last bits.
        density, mass = (min(1.0, each / self._passes) for each in self._sums.tolist())
        return SparseShares(density, mass)

    def order_tokens(self, grid: Grid, device: torch.device) -> None:
        """Set the order of the tokens of a grid."""
        if (grid, device) != self._ordered:
            order = tile_order(grid, self.settings.tile)
            self.order, self.inverse = (each.to(device) for each in (order, order.argsort()))
            self._ordered = grid, device

    def attention(self, block: int, kernels: Kernels) -> Attention:
        """Return the self-attention of the transformer's block with number `block`."""

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scales: AttentionScales | None,
            act_scale: float | None,
        ) -> Tensor:
            if self.is_exact():
                return kernels.attention(q, k, v, scales, act_scale)
            assert scales is None, "a recipe has either sparse or FP8 attention"
            kept = self._choose(block, q, k)
            return kernels.sparse_attention(q, k, v, kept, self.settings.block, act_scale)

        return attend

    def _choose(self, block: int, q: Tensor, k: Tensor) -> Tensor:
        """Return the choice of this block of the transformer, made now or some steps ago."""
        branch, settings = self.branch, self.settings
        found = branch.kept.get(block)
        if found is None or branch.step - found[0] >= settings.every_steps:
            kept = choose_blocks(q, k, settings.block, settings.share_of_mass)
            computed = density(kept, q.shape[1], settings.block)
            mass = sample_mass(q, k, kept, settings.block)
            found = branch.kept[block] = branch.step, kept, torch.stack((computed, mass))
        self._count(found[2])
        return found[1]

    def _count(self, shares: Tensor) -> None:
        # On the device, so that nothing waits for it before the end.
        self._sums = shares if self._sums is None else self._sums + shares
        self._passes += 1


def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """Return the tokens of a grid box by box, as row-major numbers: [S] int64.

    Boxes follow each other in row-major order, and so do the tokens in each.
    """
    boxes = [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    frame, row, column = (torch.arange(size) // side for size, side in zip(grid, tile, strict=True))
    box = (frame[:, None, None] * boxes[1] + row[:, None]) * boxes[2] + column
    return box.flatten().argsort(stable=True)


def sparsify(transformer: Any, settings: SparseSettings, blocks: Mapping[int, Any]) -> None:
    """Give some blocks of a transformer sparse attention, in place.

    Args:
        blocks: which blocks, by number.

    Raises:
        ConversionError: one of them is not fused.
    """
    unmet = [index for index, block in blocks.items() if not isinstance(block, FusedWanBlock)]
    if unmet:
        raise ConversionError(
            f"sparse attention needs fused blocks, and {len(unmet)} cannot be, the first being "
            f"block {unmet[0]}: the recipe has to quantize all or none of the linears that share "
            "an input (to_q, to_k, to_v), or use attention 'bf16'"
        )
    sparse = SparseAttention(settings)
    for index, block in blocks.items():
        block.self_attention = partial(sparse.attention, index)
    patch, signature = transformer.config.patch_size, inspect.signature(transformer.forward)

    def order_tokens(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        latents = signature.bind(*args, **inputs).arguments["hidden_states"]
        sizes = latents.shape[2:]
        frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
        sparse.order_tokens((frames, rows, columns), latents.device)

    transformer.register_forward_pre_hook(order_tokens, with_kwargs=True)
    transformer.rope.register_forward_hook(
        lambda _, __, angles: tuple(each[:, sparse.order] for each in angles)
    )
    transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: (args[0][:, sparse.order], *args[1:])
    )
    transformer.proj_out.register_forward_hook(lambda _, __, out: out[:, sparse.inverse])
    sparse.follow(transformer)


def sparse_attention_of(transformer: Any) -> SparseAttention | None:
    """Return a transformer's sparse attention; None if it has none."""
    steps = attention_steps_of(transformer)
    return steps if isinstance(steps, SparseAttention) else None
