"""Collect statistics of tensors inside a model while a pipeline runs; scales are chosen from them.

For each tensor, timestep group and prompt these are the largest magnitude and the mean square. For
each tensor and timestep group, a histogram of binades is counted over all prompts. Everything
accumulates on the device that the model runs on. The activations themselves are not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.numerics.metrics import sum_dtype
from quant.numerics.scaling import EXPONENTS, amax_and_exponents, fold_exponents

_STATE = ("amax", "_exponents", "_square_sum", "_count")

_MEASURED = 512
"""How many measured tensors are remembered before those that are gone are forgotten."""

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

    A tensor that several modules are given (a block's queries, keys and values have one input, and
    all blocks the same text) is measured once and counted for each.

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
        self._exponents = torch.zeros(*shape[:2], EXPONENTS, dtype=torch.int64, device=device)
        self._square_sum = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        self._count = torch.zeros(shape, dtype=torch.float64)
        self._measured: dict[int, _Measured] = {}
        self._select()

    @property
    def mean_square(self) -> Tensor:
        """Return [M, G, P] float32; 0 where nothing was recorded."""
        return (self._square_sum.cpu() / self._count.clamp(min=1)).float()

    @property
    def binades(self) -> Tensor:
        """Return [M, G, NUM_BINADES] float32, over all prompts."""
        return fold_exponents(self._exponents)

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
        self._select()

    def enter(self, group: int) -> None:
        """Record what follows under timestep group `group`."""
        self._group = group
        self._select()

    def not_finite(self) -> Tensor:
        """Return [M] bool, on the host: what saw NaN or infinity in this prompt and group."""
        return ~self.amax[:, self._group, self._prompt].isfinite().cpu()

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
            self._measured.clear()
            for handle in handles:
                handle.remove()

    def _select(self) -> None:
        """Take views of what is recorded next: to index tensors each time takes longer."""
        group, prompt = self._group, self._prompt
        self._cells = tuple(
            zip(
                self.amax[:, group, prompt].unbind(),
                self._square_sum[:, group, prompt].unbind(),
                self._exponents[:, group].unbind(),
                strict=True,
            )
        )
        self._counts = self._count[:, group, prompt].numpy()

    def _record(self, index: int, x: Tensor) -> None:
        measured = self._measured.get(id(x))
        if measured is None or measured.of() is not x or measured.version != x._version:
            if len(self._measured) >= _MEASURED:
                alive = {key: each for key, each in self._measured.items() if each.of() is not None}
                self._measured = alive
            measured = self._measured[id(x)] = _measure(x, self._square_sum.dtype)
        amax, square_sum, exponents = self._cells[index]
        torch.maximum(amax, measured.amax, out=amax)
        square_sum.add_(measured.square_sum)
        exponents.add_(measured.exponents)
        self._counts[index] += x.numel()


class _Measured(NamedTuple):
    """What was measured of one tensor, without keeping the tensor in memory.

    Attributes:
        of: the tensor, as long as it exists.
        version: torch's count of the changes in place of that tensor.
        amax, square_sum: scalars; `exponents` [EXPONENTS] int64.
    """

    of: weakref.ref[Tensor]
    version: int
    amax: Tensor
    square_sum: Tensor
    exponents: Tensor


def _measure(x: Tensor, sum_to: torch.dtype) -> _Measured:
    flat = x.reshape(-1)
    amax, exponents = amax_and_exponents(flat)
    if x.dtype == torch.bfloat16:  # its squares are exact in FP32 already, and this is faster
        values = flat.to(sum_to)
        square_sum = torch.dot(values, values)
    else:
        square_sum = flat.float().square().sum(dtype=sum_to)
    return _Measured(weakref.ref(x), x._version, amax, square_sum, exponents)
