"""Collect statistics of tensors inside a model while a pipeline runs; scales are chosen from them.

For each tensor, timestep group and prompt these are the largest magnitude and the mean square. For
each tensor and timestep group, a histogram of binades is counted over all prompts. Everything
accumulates on the device that the model runs on. The activations themselves are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.numerics.metrics import sum_dtype
from quant.numerics.scaling import NUM_BINADES, binade_histogram

_STATE = ("amax", "binades", "_square_sum", "_count")

Record = Callable[[Tensor], None]


class ObservedTensor(Protocol):
    """A tensor inside a model, computed anew in each forward pass."""

    def observe(self, record: Record) -> RemovableHandle:
        """Call `record` with the tensor in every forward pass, until the handle is removed."""


@dataclass(frozen=True, slots=True)
class ModuleInput:
    """The first input of a module."""

    module: nn.Module

    def observe(self, record: Record) -> RemovableHandle:
        return self.module.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))


@dataclass(frozen=True, slots=True)
class ModuleOutput:
    """The output of a module."""

    module: nn.Module

    def observe(self, record: Record) -> RemovableHandle:
        return self.module.register_forward_hook(lambda _, inputs, output: record(output))


@dataclass(frozen=True, slots=True)
class RotaryPairs:
    """The lengths of neighbouring pairs in the output of a module, [..., K] → [..., K / 2].

    A rotary embedding rotates each pair. Its length bounds either half at any position, so these
    statistics are valid for longer videos as well.
    """

    module: nn.Module

    def observe(self, record: Record) -> RemovableHandle:
        def record_lengths(output: Tensor) -> None:
            first, second = output.float()[..., 0::2], output.float()[..., 1::2]
            record(torch.hypot(first, second))

        return ModuleOutput(self.module).observe(record_lengths)


class ActivationStatistics:
    """Statistics of M tensors over G timestep groups and P prompts.

    Attributes:
        amax: [M, G, P] float32.
        mean_square: [M, G, P] float32, over all elements of all steps of the group.
        binades: [M, G, NUM_BINADES] float32.
    """

    def __init__(
        self, tensors: Sequence[ObservedTensor], groups: int, prompts: int, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._prompt = 0
        self._group = 0
        shape = (len(tensors), groups, prompts)
        self.amax = torch.zeros(shape, device=device)
        self.binades = torch.zeros(*shape[:2], NUM_BINADES, device=device)
        self._square_sum = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        self._count = torch.zeros(shape, dtype=torch.float64)

    @property
    def mean_square(self) -> Tensor:
        """Return [M, G, P] float32; 0 where nothing was recorded."""
        return (self._square_sum.cpu() / self._count.clamp(min=1)).float()

    @property
    def seen(self) -> Tensor:
        """Return [M, G, P] bool: whether anything was recorded."""
        return self._count > 0

    def state(self) -> dict[str, Tensor]:
        """Return all that was recorded, on the host, to be restored with the same bits."""
        return {name: getattr(self, name).cpu() for name in _STATE}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of statistics of the same tensors, groups and prompts."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])

    def begin(self, prompt: int) -> None:
        """Record what follows under prompt number `prompt`."""
        self._prompt = prompt

    def enter(self, group: int) -> None:
        """Record what follows under timestep group `group`."""
        self._group = group

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Record all tensors within the context."""
        handles = [
            tensor.observe(partial(self._record, index))
            for index, tensor in enumerate(self._tensors)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, index: int, x: Tensor) -> None:
        cell = index, self._group, self._prompt
        self.amax[cell] = torch.maximum(self.amax[cell], x.abs().amax().float())
        self._square_sum[cell] += x.float().square().sum(dtype=self._square_sum.dtype)
        self._count[cell] += x.numel()
        self.binades[index, self._group] += binade_histogram(x.reshape(1, -1))[0]
