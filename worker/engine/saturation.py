"""Sample how well one step's activations fit the quantized format, as a figure for operators.

Static scales are calibrated on some prompts, and may fit the prompts of callers less well. Two
shares measure that: of values beyond the format's range, and of nonzero values that become zero.
They are counted during one forward pass of each job, before each quantized layer rounds its inputs:
by hooks on the layers and on INT8 products, or by the kernels where blocks are fused. INT8 has a
scale for each token, so none of its values saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.kernels.int8.product import Int8Product
from quant.kernels.interface import Kernels
from quant.kernels.misfit_counter import CountingKernels
from quant.numerics import int8, reference
from quant.numerics.grid_linear import GridLinear
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import choose_scale
from quant.transformer.wan_block import FusedWanBlock
from worker.interface import ActShares

_ROUNDING = (Hif8Linear, GridLinear)


class ActSample:
    """A count over one forward pass of a transformer, started by `arm`.

    The counts stay on the device until `shares` is called, so nothing waits for it before.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        quantized = (*_ROUNDING, Int8Linear, Int8Product)
        self._linears = [m for m in transformer.modules() if isinstance(m, quantized)]
        self._blocks = [
            m for m in transformer.modules() if isinstance(m, FusedWanBlock) and _rounds(m)
        ]
        self._handles: list[RemovableHandle] = []
        self._kernels: list[tuple[FusedWanBlock, Kernels]] = []
        self._counts: Tensor | None = None
        self._total = 0

    def arm(self) -> None:
        """Count during the next pass that reaches a quantized layer, if the model has any."""
        if not self._linears and not self._blocks:
            return
        self.disarm()
        self._handles = [each.register_forward_pre_hook(self._count) for each in self._linears]
        self._handles.append(self._transformer.register_forward_hook(self._after_pass))
        for block in self._blocks:
            self._kernels.append((block, block.kernels))
            block.kernels = CountingKernels(block.kernels, self._add)

    def disarm(self) -> None:
        """Stop counting; no error if it has stopped or never started."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block, kernels in self._kernels:
            block.kernels = kernels
        self._kernels.clear()

    def shares(self) -> ActShares | None:
        """Compute the shares from the counts; None if nothing was counted."""
        if self._counts is None:
            return None
        # Divided on the host: not every device has float64.
        saturated, flushed = (count / self._total for count in self._counts.tolist())
        return ActShares(saturated, flushed)

    def _after_pass(self, *_: object) -> None:
        # A pass that a step cache shortened may have reached no quantized layer.
        if self._counts is not None:
            self.disarm()

    @torch.no_grad()
    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if not isinstance(module, _ROUNDING):
            self._add(int8.misfits(x), x.numel())
            return
        scale = module.act_scale
        if scale is None:
            scale = choose_scale(module.act_policy, x.abs().amax(-1, keepdim=True))
        self._add(reference.misfits(x, scale), x.numel())

    def _add(self, counts: Tensor, values: int) -> None:
        self._total += values
        self._counts = counts if self._counts is None else self._counts + counts


def _rounds(block: FusedWanBlock) -> bool:
    """Return whether any product of a block rounds its activations."""
    return any(getattr(part, "act_scale", None) is not None for part in block.children())
