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
    def measure(cls, x: Tensor) -> Tensor:
        """Measure each sample of x [B, ..., K]: [B, values] float32, in the order of `names`."""
        magnitude = x.detach().abs().float().reshape(len(x), -1, x.shape[-1])
        channels = magnitude.amax(1)
        flat = magnitude.flatten(1)
        sample = flat[:, :: max(1, flat.shape[1] // _SAMPLES)][:, :_SAMPLES]
        square = flat.square()
        kurtosis = square.square().mean(1) / square.mean(1).square().clamp(min=1e-30)
        outliers = (channels > OUTLIER_FACTOR * channels.median(1, keepdim=True).values).sum(1)
        values = (channels.amax(1), *_quantiles(sample), kurtosis, outliers.float())
        return torch.stack(values, 1)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the values."""
        return tuple(each.name for each in fields(cls))


def _quantiles(sample: Tensor) -> Iterator[Tensor]:
    """Return percentiles 50, 99 and 99.9 of each row of [B, N], interpolated: three of [B]."""
    shares = (0.5, 0.99, 0.999)
    if sample.device.type == "cpu":  # numpy divides where torch sorts
        found = torch.from_numpy(np.quantile(sample.numpy(), shares, axis=1))
        yield from found.to(sample.dtype)
        return
    ordered = sample.sort(1).values
    for share in shares:
        place = share * (sample.shape[1] - 1)
        low = int(place)
        high = min(low + 1, sample.shape[1] - 1)
        yield torch.lerp(ordered[:, low], ordered[:, high], place - low)


@dataclass(slots=True)
class Measured:
    """What one pass over B points shows.

    Attributes:
        linears: statistics of each linear's input, [B, values] by its full name.
        binades: histogram of each linear's input over all points, [NUM_BINADES] by its full name.
        stream: statistics of the stream after each block, [B, values] each.
        update: |what the block adds| / |the stream before it|, [B] for each block.
    """

    linears: dict[str, Tensor]
    binades: dict[str, Tensor]
    stream: list[Tensor]
    update: list[Tensor]


def measure_points(
    stream: BlockStream, points: Sequence[Point], linears: Mapping[int, Sequence[str]]
) -> Measured:
    """Run one pass over points and measure it; the results are on the host.

    Args:
        linears: names of the linears to measure inside each block, by the block's number.
    """
    found = Measured({}, {}, [], [])
    before, conditions = stream.begin(points)
    for index in range(stream.blocks):
        block = stream.block(index)
        names = linears.get(index, ())
        with _watching(block, f"blocks.{index}", names, found), torch.no_grad():
            after = block(before, conditions.text, conditions.timestep, conditions.rope)
        found.stream.append(Activation.measure(after))
        change = (after.float() - before.float()).square().sum((1, 2))
        found.update.append((change / before.float().square().sum((1, 2))).sqrt())
        before = after
    return Measured(
        {name: each.cpu() for name, each in found.linears.items()},
        {name: each.cpu() for name, each in found.binades.items()},
        [each.cpu() for each in found.stream],
        [each.cpu() for each in found.update],
    )


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
    block: nn.Module, prefix: str, names: Sequence[str], found: Measured
) -> Iterator[None]:
    last: list[tuple[Tensor, str]] = []

    def record(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if last and last[0][0] is x:  # queries, keys and values have one input
            of = last[0][1]
            found.linears[name], found.binades[name] = found.linears[of], found.binades[of]
            return
        last[:] = [(x, name)]
        found.linears[name] = Activation.measure(x)
        found.binades[name] = binade_histogram(x.reshape(1, -1))[0]

    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(record, f"{prefix}.{name}"))
        for name in names
    ]
    try:
        yield
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
