"""Watch tensors inside a model while a pipeline runs, and keep what scales are chosen from.

Per tensor, timestep group and prompt: the largest magnitude and the mean square. Per tensor and
timestep group, over all prompts: a histogram of binades. Everything accumulates on the device the
model runs on; nothing of the activations themselves is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.numerics.scaling import NUM_BINADES, binade_histogram

Record = Callable[[Tensor], None]


class Point(Protocol):
    """A place in a model where a tensor passes by."""

    def watch(self, record: Record) -> RemovableHandle:
        """Have `record` called with every tensor that passes, until the handle is removed."""


@dataclass(frozen=True, slots=True)
class InputOf:
    """What goes into a module."""

    module: nn.Module

    def watch(self, record: Record) -> RemovableHandle:
        return self.module.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))


@dataclass(frozen=True, slots=True)
class OutputOf:
    """What a module gives out."""

    module: nn.Module

    def watch(self, record: Record) -> RemovableHandle:
        return self.module.register_forward_hook(lambda _, inputs, output: record(output))


@dataclass(frozen=True, slots=True)
class RotaryPairsOf:
    """The lengths of the neighbouring pairs in what a module gives out, [..., K] → [..., K / 2].

    A rotary embedding turns each pair; its length is the most either half can become at any
    position, so what is seen here holds for longer videos, too.
    """

    module: nn.Module

    def watch(self, record: Record) -> RemovableHandle:
        def of_pairs(output: Tensor) -> None:
            first, second = output.float()[..., 0::2], output.float()[..., 1::2]
            record(torch.hypot(first, second))

        return OutputOf(self.module).watch(of_pairs)


class ActivationStatistics:
    """Statistics of the tensors at M points over G timestep groups and P prompts.

    Attributes:
        amax: [M, G, P] float32.
        mean_square: [M, G, P] float32, over all elements of all steps of the group.
        binades: [M, G, NUM_BINADES] float32.
    """

    def __init__(
        self, points: Sequence[Point], groups: int, prompts: int, device: torch.device
    ) -> None:
        self._points = points
        self._prompt = 0
        self._group = 0
        shape = (len(points), groups, prompts)
        self.amax = torch.zeros(shape, device=device)
        self.binades = torch.zeros(*shape[:2], NUM_BINADES, device=device)
        self._square_sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._count = torch.zeros(shape, dtype=torch.float64)

    @property
    def mean_square(self) -> Tensor:
        """[M, G, P] float32; 0 where nothing was seen."""
        return (self._square_sum.cpu() / self._count.clamp(min=1)).float()

    @property
    def seen(self) -> Tensor:
        """[M, G, P] bool: where anything passed at all."""
        return self._count > 0

    def begin(self, prompt: int) -> None:
        """Count what follows as prompt number `prompt`."""
        self._prompt = prompt

    def enter(self, group: int) -> None:
        """Count what follows as timestep group `group`."""
        self._group = group

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what passes every point while the context lasts."""
        handles = [
            point.watch(partial(self._record, index)) for index, point in enumerate(self._points)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, index: int, x: Tensor) -> None:
        place = index, self._group, self._prompt
        self.amax[place] = torch.maximum(self.amax[place], x.abs().amax().float())
        self._square_sum[place] += x.float().square().sum(dtype=torch.float64)
        self._count[place] += x.numel()
        self.binades[index, self._group] += binade_histogram(x.reshape(1, -1))[0]
