"""Compute linears with BF16 weights that share their input, one by one or as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.kernels.interface import BlockLinear, Kernels
from quant.numerics import reference
from quant.numerics.grid_linear import GridLinear
from quant.numerics.linear import Hif8Linear


class SeparateLinears(nn.Module):
    """Computes the linears one by one, in plain torch."""

    act_scale: float | None = None

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self._linears = tuple(linears)

    def forward(self, x: Tensor) -> Tensor:
        parts = [reference.product(x, each.weight, each.bias) for each in self._linears]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class JoinedLinear(nn.Module):
    """Computes linears that share an input as one BF16 product.

    The weights of the linears become views of the joined weight.
    """

    act_scale: float | None = None

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _joined([linear.weight for linear in linears])
        self.bias = joined_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        return reference.product(x, self.weight, self.bias)


class GridProduct(nn.Module):
    """Computes quantized linears whose weights were decoded once, as kernels do BF16 linears.

    It fits kernels whose form of quantized activations is BF16 numbers.
    """

    def __init__(self, kernels: Kernels, linears: Sequence[GridLinear]) -> None:
        super().__init__()
        self.product: BlockLinear = kernels.plain(linears)
        self.act_scale = shared_act_scale(linears)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def shared_act_scale(linears: Sequence[Hif8Linear | GridLinear]) -> float:
    """Return the scale for the input that linears share: the largest, so that none saturates."""
    scales = [linear.act_scale for linear in linears if linear.act_scale is not None]
    return float(torch.stack(scales).max())  # one device synchronization for all


def joined_bias(linears: Sequence[nn.Module]) -> nn.Parameter | None:
    """Join the biases of linears into one; None if no linear has one."""
    biases = [each.bias for each in linears if isinstance(each.bias, Tensor)]
    assert len(biases) in (0, len(linears)), "linears that share an input have biases, or have none"
    return _joined(biases) if biases else None


def _joined(tensors: Sequence[Tensor]) -> nn.Parameter:
    """Join parameters into one along the first dimension; they become views of it.

    They stay the same objects, so other trees that share them see the views as well. Parameters
    that are already neighbours in one storage are not copied.
    """
    base = tensors[0]
    if len(tensors) == 1:
        return nn.Parameter(base.data, requires_grad=False)
    step = base.numel() * base.element_size()
    storage = base.untyped_storage().data_ptr()
    if all(
        each.untyped_storage().data_ptr() == storage
        and each.data_ptr() == base.data_ptr() + index * step
        for index, each in enumerate(tensors)
    ):
        shape = (sum(each.shape[0] for each in tensors), *base.shape[1:])
        return nn.Parameter(base.data.as_strided(shape, base.stride()), requires_grad=False)
    joined = nn.Parameter(torch.cat([each.data for each in tensors]), requires_grad=False)
    rows = [each.shape[0] for each in tensors]
    for each, view in zip(tensors, torch.split(joined.data, rows), strict=True):
        each.data = view
    return joined
