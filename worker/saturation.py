"""How well one step's activations fit the quantized format: a sample for operators.

A static scale was calibrated on some prompts; whether it fits what callers ask for shows in how
many values lie beyond the format, and how many become zero although they are none. Counted over
one forward pass of each job, before each quantized layer rounds its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.hif8 import FLUSHED_BELOW, LARGEST
from quant.linear import Hif8Linear
from quant.scaling import choose_scale

_PIECE = 1 << 24  # elements


@dataclass(frozen=True, slots=True)
class ActShares:
    """Shares of the values that went into the quantized layers, 0 to 1."""

    saturated: float
    flushed: float


class ActSample:
    """Counts over one forward pass of a transformer, once `arm` was called.

    The counts stay on the device until `shares` is asked for, so nothing waits for it meanwhile.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._linears = [m for m in transformer.modules() if isinstance(m, Hif8Linear)]
        self._handles: list[RemovableHandle] = []
        self._counts: Tensor | None = None
        self._total = 0

    def arm(self) -> None:
        """Count during the next forward pass; without quantized layers there is nothing to."""
        if not self._linears:
            return
        self._handles = [each.register_forward_pre_hook(self._count) for each in self._linears]
        self._handles.append(self._transformer.register_forward_hook(lambda *_: self.disarm()))

    def disarm(self) -> None:
        """Stop counting; harmless where it has stopped, or never began."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def shares(self) -> ActShares | None:
        """What was counted; None if nothing was."""
        if self._counts is None:
            return None
        saturated, flushed = (self._counts.double() / self._total).tolist()
        return ActShares(saturated, flushed)

    @torch.no_grad()
    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Hif8Linear)
        x = args[0].reshape(-1, args[0].shape[-1])
        self._total += x.numel()
        # In pieces: a sample must not be what fills the device's memory.
        for piece in torch.split(x, max(1, _PIECE // x.shape[-1])):
            counts = _beyond_and_gone(piece.abs().float(), module)
            self._counts = counts if self._counts is None else self._counts + counts


def _beyond_and_gone(magnitude: Tensor, module: Hif8Linear) -> Tensor:
    """Count what saturates and what becomes zero: |x| [R, K] float32 → [2] int64."""
    scale = module.act_scale
    if scale is None:
        scale = choose_scale(module.act_policy, magnitude.amax(-1, keepdim=True))
    beyond = (magnitude > LARGEST * scale).sum()
    gone = ((magnitude < FLUSHED_BELOW * scale) & (magnitude > 0)).sum()
    return torch.stack((beyond, gone))
