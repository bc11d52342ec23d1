"""Keep a module on the host and copy it to the device only while it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OffloadedModule:
    """A module whose weights stay in pinned host memory and are copied to a device for each use.

    Nothing is copied back, because weights do not change: the copies on the device are dropped.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Pin the weights of a module that is on the host."""
        self.module = module
        self.device = device
        if device.type != "cpu":
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """Put the module on the device for the duration of the block, even if the block raises."""
        on_host = [(tensor, tensor.data) for tensor in self._tensors()]
        try:
            for tensor, data in on_host:
                tensor.data = data.to(self.device, non_blocking=True, copy=True)
            yield self.module
        finally:
            for tensor, data in on_host:
                tensor.data = data

    def _tensors(self) -> list[Tensor]:
        """Iterate over the tensors, each once, even if the module has it under several names."""
        every = (*self.module.parameters(), *self.module.buffers())
        return list({id(tensor): tensor for tensor in every}.values())
