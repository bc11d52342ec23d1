"""Measure activations at points: the inputs of linears, and the residual stream at each block.

One pass gives everything that is known
without quantizing anything: the paper's largest magnitudes (its figures 1b and 2), outliers, and
how much a block changes the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quant.numerics.scaling import FIRST_BINADE, NUM_BINADES, binade_histogram
from quant.studies.block_stream import BlockStream
from quant.studies.points import Point

OUTLIER_FACTOR = 6.0
"""A channel is an outlier if its largest magnitude is above this many times the median channel's
(LLM.int8() calls values above 6 outliers)."""

_SAMPLES = 1 << 16
"""Percentiles are of at most this many values, spread evenly."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Statistics of one tensor at one point.

    Attributes:
        amax: largest magnitude.
        p50, p99, p999: percentiles 50, 99 and 99.9 of the magnitudes.
        kurtosis: fourth moment over the square of the second; 3 for a normal distribution.
        outlier_channels: how many channels are outliers (`OUTLIER_FACTOR`).
    """

    amax: float
    p50: float
    p99: float
    p999: float
    kurtosis: float
    outlier_channels: int

    @classmethod
    def of(cls, x: Tensor) -> Activation:
        """Measure x [..., K]."""
        magnitude = x.detach().abs().float().reshape(-1, x.shape[-1])
        channels = magnitude.amax(0)
        flat = magnitude.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().numpy()
        p50, p99, p999 = np.quantile(sample, (0.5, 0.99, 0.999)).tolist()  # torch's sorts
        square = flat.square()
        kurtosis = square.square().mean() / square.mean().square().clamp(min=1e-30)
        outliers = (channels > OUTLIER_FACTOR * channels.median()).sum()
        return cls(channels.amax().item(), p50, p99, p999, kurtosis.item(), int(outliers))

    def as_list(self) -> list[float]:
        """Return the values in the order of `names`."""
        return [getattr(self, name) for name in self.names()]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the values."""
        return tuple(each.name for each in fields(cls))


@dataclass(slots=True)
class PointActivations:
    """What one pass at one point shows.

    Attributes:
        linears: statistics of each linear's input, by its full name.
        binades: histogram of each linear's input, [NUM_BINADES] by its full name.
        stream: statistics of the stream after each block.
        update: |what the block adds| / |the stream before it|, for each block.
    """

    linears: dict[str, Activation]
    binades: dict[str, Tensor]
    stream: list[Activation]
    update: list[float]


def measure_point(
    stream: BlockStream, point: Point, linears: Mapping[int, Sequence[str]]
) -> PointActivations:
    """Run one pass and measure it.

    Args:
        linears: names of the linears to measure inside each block, by the block's number.
    """
    found = PointActivations({}, {}, [], [])
    before, conditions = stream.begin([point])
    for index in range(stream.blocks):
        block = stream.block(index)
        names = linears.get(index, ())
        with _watching(block, f"blocks.{index}", names, found), torch.no_grad():
            after = block(before, conditions.text, conditions.timestep, conditions.rope)
        found.stream.append(Activation.of(after))
        change = (after.float() - before.float()).square().sum()
        found.update.append(float((change / before.float().square().sum()).sqrt()))
        before = after
    return found


def share_beyond_band(binades: Sequence[float], scale: float) -> float:
    """Return the share of nonzero values that have fewer than 3 mantissa bits in HiFloat8.

    Under a power-of-two scale these are the magnitudes outside [2**-3, 2**4) times the scale.

    Args:
        binades: histogram by `binade_histogram`, [NUM_BINADES].
    """
    exponent = torch.tensor(scale).frexp().exponent.item() - 1
    inside = range(int(exponent) - 3 - FIRST_BINADE, int(exponent) + 4 - FIRST_BINADE)
    total = sum(binades)
    kept = sum(binades[each] for each in inside if 0 <= each < NUM_BINADES)
    return 1 - kept / total if total else 0.0


@contextmanager
def _watching(
    block: nn.Module, prefix: str, names: Sequence[str], found: PointActivations
) -> Iterator[None]:
    def record(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        found.linears[name] = Activation.of(x)
        found.binades[name] = binade_histogram(x.reshape(1, -1))[0].cpu()

    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(record, f"{prefix}.{name}"))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
