"""A module that is on the device only while it is used, and costs one copy each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OffloadedModule:
    """Keeps a module's weights in pinned memory of the host and lends them to a device.

    Nothing is copied back, since weights do not change: the device's copies are dropped.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Take over a module that is on the host."""
        self.module = module
        self.device = device
        if device.type != "cpu":
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module on the device, for the length of the block, however that ends."""
        home = [(tensor, tensor.data) for tensor in self._tensors()]
        try:
            for tensor, data in home:
                tensor.data = data.to(self.device, non_blocking=True, copy=True)
            yield self.module
        finally:
            for tensor, data in home:
                tensor.data = data

    def _tensors(self) -> list[Tensor]:
        """Each once, also where the module has it under several names."""
        every = (*self.module.parameters(), *self.module.buffers())
        return list({id(tensor): tensor for tensor in every}.values())
