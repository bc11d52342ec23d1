"""Measure what quantizing one block, or one linear, does to the velocity at a point.

The reference is the same model in float32. A variant runs from the reference's stream at its block,
and all later blocks are exact: a block's error is what the velocity loses by that block alone, as a
share of the velocity's energy. Teacher-forced: every point has the input that the BF16 model had
there, so no error of earlier steps is in it.

Variants run together: one sweep over the blocks takes the reference and every variant that has
begun through each block, so that a block is brought to the device once for many variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.studies.block_stream import BlockStream, Conditions
from quant.studies.points import Point
from quant.studies.protection.variants import BlockQuantizer

_HELD_BYTES = 8 << 30
"""Streams of one sweep take at most this, or two streams. Beside the 14B's blocks and what runs, a
device of 80 GB has room for it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model in which only some linears of one block are quantized.

    Attributes:
        key: its name in results.
        names: full names of the linears.
    """

    key: str
    block: int
    names: tuple[str, ...]


def sweeps(variants: Sequence[Variant], stream_bytes: int) -> list[Sequence[Variant]]:
    """Divide variants, ordered by block, into those of one sweep each.

    Args:
        stream_bytes: of the points' residual stream in float32.
    """
    held = max(1, _HELD_BYTES // stream_bytes - 1)  # the reference is held, too
    return [variants[start : start + held] for start in range(0, len(variants), held)]


def sweep_cost(blocks: int, variants: Sequence[Variant], points: int) -> int:
    """Return how many passes of one block a sweep takes."""
    return points * (blocks + sum(blocks - each.block for each in variants))


def energies(found: Tensor, reference: Tensor) -> list[float]:
    """Return |found − reference|² / |reference|² of each sample of [B, ...]."""
    dims = tuple(range(1, found.dim()))
    error = (found.double() - reference.double()).square().sum(dims)
    shares: list[float] = (error / reference.double().square().sum(dims)).tolist()
    return shares


@dataclass(frozen=True, slots=True)
class Sweep:
    """Measures variants at points in sweeps over the blocks.

    Attributes:
        batch: how many samples run together.
        on_passes: called after each block with the number of samples that it took.
    """

    stream: BlockStream
    quantizer: BlockQuantizer
    batch: int
    on_passes: Callable[[int], None] = lambda passes: None

    @torch.no_grad()
    def energies(
        self, points: Sequence[Point], variants: Sequence[Variant]
    ) -> dict[str, list[float]]:
        """Return the error energies at each point for each variant, by its key.

        Args:
            variants: ordered by block.
        """
        stream = self.stream
        first, conditions = stream.begin(points)
        held = _HeldStreams(first, conditions, max(1, self.batch // len(points)))
        by_block: dict[int, list[Variant]] = {}
        for each in variants:
            by_block.setdefault(each.block, []).append(each)
        for index in range(stream.blocks):
            block = stream.block(index)
            begun = []
            for each in by_block.get(index, ()):
                changed = self.quantizer.variant(index, block, each.names)
                begun.append(_run(changed, held.reference, conditions))
                del changed  # before the next one is made
            held.run(block)
            held.add(begun)
            self.on_passes(held.samples)
        return held.energies(stream, [each.key for each in variants])


class _HeldStreams:
    """The streams of a sweep, in chunks that run together: the reference, then the variants."""

    def __init__(self, first: Tensor, conditions: Conditions, per_chunk: int) -> None:
        self._points = len(first)
        self._per_chunk = per_chunk
        self._conditions = conditions
        self._tiled: dict[int, Conditions] = {}
        self._chunks = [first]

    @property
    def reference(self) -> Tensor:
        """Return the exact stream, [points, S, K]."""
        return self._chunks[0][: self._points]

    @property
    def samples(self) -> int:
        """Return how many streams are held."""
        return sum(map(len, self._chunks))

    def add(self, streams: Sequence[Tensor]) -> None:
        """Append the streams of variants that have begun."""
        for stream in streams:
            last = self._chunks[-1]
            if len(last) < self._per_chunk * self._points:
                self._chunks[-1] = torch.cat((last, stream))
            else:
                self._chunks.append(stream)

    def run(self, block: nn.Module) -> None:
        """Take every stream through an exact block."""
        for place, chunk in enumerate(self._chunks):
            self._chunks[place] = _run(block, chunk, self._conditions_of(chunk))

    def energies(self, stream: BlockStream, keys: Sequence[str]) -> dict[str, list[float]]:
        """Return the energies of the variants, named `keys` in the order they were added in."""
        found: list[list[float]] = []
        reference: Tensor | None = None
        for chunk in self._chunks:
            velocity = stream.end(chunk, self._conditions_of(chunk))
            parts = list(torch.split(velocity, self._points))
            if reference is None:
                reference = parts.pop(0)
            found += [energies(each, reference) for each in parts]
        return dict(zip(keys, found, strict=True))

    def _conditions_of(self, chunk: Tensor) -> Conditions:
        times = len(chunk) // self._points
        if times not in self._tiled:
            self._tiled[times] = self._conditions.tiled(times)
        return self._tiled[times]


def _run(block: nn.Module, stream: Tensor, conditions: Conditions) -> Tensor:
    after: Tensor = block(stream, conditions.text, conditions.timestep, conditions.rope)
    return after


def set_energies(
    stream: BlockStream,
    points: Sequence[Point],
    reference: Tensor,
    quantizer: BlockQuantizer,
    names: Mapping[int, Sequence[str]],
) -> list[float]:
    """Return the error energies at points with the linears `names` of several blocks quantized.

    Args:
        reference: the exact velocity, [B, C, F, H, W].
        names: full names of the linears, by block.
    """

    def change(index: int, block: nn.Module) -> nn.Module:
        if not names.get(index):
            return block
        return quantizer.variant(index, block, names[index])

    return energies(stream.velocity(points, change), reference)
