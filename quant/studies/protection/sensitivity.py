"""Measure what quantizing one block, or one linear, does to the velocity at a point.

The reference is the same model in float32. A variant runs from the reference's stream at its block,
and all later blocks are exact: a block's error is what the velocity loses by that block alone, as a
share of the velocity's energy. Teacher-forced: every point has the input that the BF16 model had
there, so no error of earlier steps is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.studies.block_stream import BlockStream, Conditions
from quant.studies.points import Point
from quant.studies.protection.variants import BlockQuantizer


@dataclass(frozen=True, slots=True)
class Reference:
    """A float32 pass at some points.

    Attributes:
        streams: before each block, and after the last one; on the host where `BlockStream` streams.
        velocity: [B, C, F, H, W].
    """

    streams: list[Tensor]
    conditions: Conditions
    velocity: Tensor


def reference_pass(
    stream: BlockStream, points: Sequence[Point], keep_on: torch.device
) -> Reference:
    """Run the exact model.

    Args:
        keep_on: where the streams are kept.
    """
    first, conditions = stream.begin(points)
    kept, last = [first.to(keep_on)], first
    for after in stream.passes(first, conditions):
        kept.append(after.to(keep_on))
        last = after
    return Reference(kept, conditions, stream.end(last, conditions))


def energies(found: Tensor, reference: Tensor) -> list[float]:
    """Return |found − reference|² / |reference|² of each sample of [B, ...]."""
    dims = tuple(range(1, found.dim()))
    error = (found.double() - reference.double()).square().sum(dims)
    return [float(each) for each in error / reference.double().square().sum(dims)]


def variant_energies(
    stream: BlockStream,
    reference: Reference,
    quantizer: BlockQuantizer,
    index: int,
    variants: Sequence[Sequence[str]],
    batch: int,
) -> Iterator[list[float]]:
    """Yield the error energies at each point for each variant of block `index`.

    Args:
        variants: the full names of the linears that each variant quantizes.
        batch: how many samples run together.
    """
    before = reference.streams[index].to(stream.device)
    conditions = reference.conditions
    block = stream.block(index)
    points = len(before)
    at_once = max(1, batch // points)
    for start in range(0, len(variants), at_once):
        part = variants[start : start + at_once]
        after = [_run(quantizer.variant(index, block, names), before, conditions) for names in part]
        # [variants, points, S, K] → samples of one point in a row, as `repeated` has them.
        together = torch.stack(after, 1).flatten(0, 1)
        repeated = conditions.repeated(len(part))
        for last in stream.passes(together, repeated, first=index + 1):
            together = last
        velocity = stream.end(together, repeated)
        expected = reference.velocity.repeat_interleave(len(part), 0)
        found = energies(velocity, expected)
        for number in range(len(part)):
            yield found[number :: len(part)]


@torch.no_grad()
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
