"""Watch the inputs of linears while a pipeline runs, and keep what scales are chosen from.

Per linear, timestep group and prompt: the largest magnitude and the mean square. Per linear and
timestep group, over all prompts: a histogram of binades. Everything accumulates on the device the
model runs on; nothing of the activations themselves is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.scaling import NUM_BINADES, binade_histogram


class ActivationStatistics:
    """Statistics of the inputs of M linears over G timestep groups and P prompts.

    Attributes:
        amax: [M, G, P] float32.
        mean_square: [M, G, P] float32, over all elements of all steps of the group.
        binades: [M, G, NUM_BINADES] float32.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], groups: int, prompts: int) -> None:
        device = next(iter(linears.values())).weight.device
        self._linears = linears
        self._prompt = 0
        self._group = 0
        shape = (len(linears), groups, prompts)
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
        """[M, G, P] bool: where a linear ran at all."""
        return self._count > 0

    def begin(self, prompt: int) -> None:
        """Count what follows as prompt number `prompt`."""
        self._prompt = prompt

    def enter(self, group: int) -> None:
        """Count what follows as timestep group `group`."""
        self._group = group

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the input of every linear while the context lasts."""
        handles = [
            linear.register_forward_pre_hook(self._recorder(index))
            for index, linear in enumerate(self._linears.values())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            place = index, self._group, self._prompt
            self.amax[place] = torch.maximum(self.amax[place], x.abs().amax().float())
            self._square_sum[place] += x.float().square().sum(dtype=torch.float64)
            self._count[place] += x.numel()
            self.binades[index, self._group] += binade_histogram(x.reshape(1, -1))[0]

        return record
