"""Run a transformer's self-attention over some blocks of its tokens (`attention = "sparse"`).

Tokens go through the blocks of the transformer in tile order: box by box of some frames, rows and
columns, so that neighbours in the sequence are neighbours in the video. Each forward pass puts them
in this order once, and their rotary angles as well, and undoes it at the end. Where a grid is no
multiple of the box, boxes at its edges are smaller, and the blocks behind them hold parts of two.

Blocks are chosen for each head, anew after some steps, and separately for each prompt: with
guidance a step has two passes, whose attention differs. What is kept between steps belongs to a
run, one denoising loop (`sparse_run`). Outside of a run each pass chooses for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.errors import ConversionError
from quant.kernels.interface import AttentionScales, Kernels
from quant.kernels.sparse.blocks import choose_blocks, density, sample_mass
from quant.recipe.recipe import QuantRecipe
from quant.recipe.sparse import SparseSettings
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


@dataclass(slots=True)
class _Branch:
    """The passes of one prompt in a run.

    Attributes:
        prompt: the tensor by which a pass is known to be of this branch.
        step: number of the present pass, from 0.
        kept: by block of the transformer, the step of the choice, the choice, and its density and
            mass in that step, [2].
    """

    prompt: Any
    step: int
    kept: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)


class SparseAttention:
    """The sparse self-attention of one transformer: settings, present pass, and counts.

    Attributes:
        order: the row-major number of each token in tile order, [S] int64, from `begin_pass`.
        inverse: the place of each token in that order, [S] int64.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, settings: SparseSettings) -> None:
        self.settings = settings
        self._branches: dict[int, _Branch] | None = None
        self._branch = _Branch(None, settings.dense_steps)
        self._ordered: tuple[Grid, torch.device] | None = None
        self._sums: Tensor | None = None
        self._passes = 0

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count steps and keep choices within the context, and the shares until the next one."""
        self._branches, self._sums, self._passes = {}, None, 0
        try:
            yield
        finally:
            # What is kept may take hundreds of megabytes.
            self._branches, self._branch = None, _Branch(None, self.settings.dense_steps)

    def shares(self) -> SparseShares | None:
        """Compute the shares of the last run; None if all of its attention was dense."""
        if self._sums is None:
            return None
        # Sums of float32 may exceed 1 in their last bits.
        density, mass = (min(1.0, each / self._passes) for each in self._sums.tolist())
        return SparseShares(density, mass)

    def begin_pass(self, grid: Grid, prompt: Tensor) -> None:
        """Note the grid of the tokens, and which prompt the pass is of."""
        if (grid, prompt.device) != self._ordered:
            order = tile_order(grid, self.settings.tile)
            self.order, self.inverse = (each.to(prompt.device) for each in (order, order.argsort()))
            self._ordered = grid, prompt.device
        if self._branches is None:
            self._branch = _Branch(prompt, self.settings.dense_steps)
            return
        self._branch = self._branches.setdefault(id(prompt), _Branch(prompt, -1))
        self._branch.step += 1

    def attention(self, block: int, kernels: Kernels) -> Attention:
        """Return the self-attention of the transformer's block with number `block`."""

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scales: AttentionScales | None,
            act_scale: float | None,
        ) -> Tensor:
            if self._branch.step < self.settings.dense_steps:
                return kernels.attention(q, k, v, scales, act_scale)
            assert scales is None, "a recipe has either sparse or FP8 attention"
            kept = self._choose(block, q, k)
            return kernels.sparse_attention(q, k, v, kept, self.settings.block, act_scale)

        return attend

    def _choose(self, block: int, q: Tensor, k: Tensor) -> Tensor:
        """Return the choice of this block of the transformer, made now or some steps ago."""
        branch, settings = self._branch, self.settings
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


def sparsify(transformer: Any, recipe: QuantRecipe) -> None:
    """Give the quantized blocks of a transformer a recipe's sparse attention, in place.

    Call it after `fuse_quantized`. Recipes with other attention change nothing.

    Raises:
        ConversionError: a block that is to have it is not fused.
    """
    if recipe.sparse is None:
        return
    blocks = {index: transformer.blocks[index] for index in recipe.quantized_blocks}
    unmet = [index for index, block in blocks.items() if not isinstance(block, FusedWanBlock)]
    if unmet:
        raise ConversionError(
            f"sparse attention needs fused blocks, and {len(unmet)} cannot be, the first being "
            f"block {unmet[0]}: the recipe has to quantize all or none of the linears that share "
            "an input (to_q, to_k, to_v), or use attention 'bf16'"
        )
    sparse = SparseAttention(recipe.sparse)
    for index, block in blocks.items():
        block.self_attention = partial(sparse.attention, index)
    patch, signature = transformer.config.patch_size, inspect.signature(transformer.forward)

    def begin(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        latents, _, prompt = signature.bind(*args, **inputs).args[:3]
        sizes = latents.shape[2:]
        frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
        sparse.begin_pass((frames, rows, columns), prompt)

    transformer.register_forward_pre_hook(begin, with_kwargs=True)
    transformer.rope.register_forward_hook(
        lambda _, __, angles: tuple(each[:, sparse.order] for each in angles)
    )
    transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: (args[0][:, sparse.order], *args[1:])
    )
    transformer.proj_out.register_forward_hook(lambda _, __, out: out[:, sparse.inverse])
    transformer.sparse_attention = sparse


def sparse_attention_of(transformer: Any) -> SparseAttention | None:
    """Return a transformer's sparse attention; None if it has none."""
    found: SparseAttention | None = getattr(transformer, "sparse_attention", None)
    return found


@contextmanager
def sparse_run(transformer: Any) -> Iterator[None]:
    """Denoise once within the context; without sparse attention it changes nothing."""
    sparse = sparse_attention_of(transformer)
    if sparse is None:
        yield
        return
    with sparse.run():
        yield
