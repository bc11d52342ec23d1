"""Choose how the weights of quantized linears are held: as codes, or decoded once to BF16.

Decoded weights take twice the memory and are read as they are. The products have the same bits in
both forms, so the choice is one of memory and time only, and no part of what identifies a model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from quant.kernels.interface import Kernels
from quant.numerics.grid_linear import GridLinear
from quant.numerics.linear import Hif8Linear

WeightStorage = Literal["packed", "bf16_grid"]
"""Codes of 8 bits, or BF16 numbers on the grid of HiFloat8."""


def decode_weights(root: nn.Module) -> None:
    """Replace every `Hif8Linear` below `root` by a `GridLinear`, in place, one after another.

    Each layer's codes are freed, unless another tree has them, before the next layer is decoded.
    """
    # Neither list nor iterator may hold a replaced layer, because its codes would stay.
    for parent in [each for each in root.modules() if not isinstance(each, Hif8Linear)]:
        for name in [name for name, _ in parent.named_children()]:
            child = parent.get_submodule(name)
            if isinstance(child, Hif8Linear):
                parent.register_module(name, GridLinear.from_hif8(child))


def reads_decoded(kernels: Kernels, device: torch.device) -> bool:
    """Return whether the form that kernels round activations to is BF16, by trying it.

    Only then do their BF16 products fit. An accelerator may turn out to multiply codes itself.
    """
    x = torch.ones(1, 1, 32, dtype=torch.bfloat16, device=device)
    return kernels.round_act(x, 1.0).dtype is torch.bfloat16


def decoded_extra_bytes(root: nn.Module) -> int:
    """Return the bytes that a tree grows by under `decode_weights`; it may be a meta model."""
    linears = [each for each in root.modules() if isinstance(each, Hif8Linear)]
    return sum(each.weight_qdata.numel() - each.weight_scale.nbytes for each in linears)
