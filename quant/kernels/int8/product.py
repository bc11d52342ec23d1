"""Compute INT8 linears that share their input as one product, in plain torch.

It takes BF16 and quantizes each token itself, because a token's scale needs the whole token. The
other modules of this folder do the same with a device's own operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from quant.kernels.joined_linear import joined_bias
from quant.numerics import int8
from quant.numerics.int8_linear import Int8Linear


class Int8Product(nn.Module):
    """INT8 linears that share their input, as one product of plain torch.

    Buffers:
        weight: [N, K] int8.
        weight_scale: [N, 1] float32.
    """

    act_scale: float | None = None
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        super().__init__()
        self.register_buffer("weight", _joined([each.weight_qdata for each in linears]))
        self.register_buffer("weight_scale", _joined([each.weight_scale for each in linears]))
        self.bias = joined_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        multiply = _fastest_multiply() if x.device.type == "cpu" else int8.multiply
        return int8.linear(x, self.weight, self.weight_scale, self.bias, multiply)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@lru_cache(maxsize=1)
def _fastest_multiply() -> int8.Multiply:
    """Return torch's integer product of the CPU if it is exact here, else the one by float32.

    On processors without instructions for it, libraries have added pairs of products in 16 bits,
    which large codes overflow.
    """
    largest = torch.full((32, 256), int8.QMAX, dtype=torch.int8)
    mixed = largest.clone()
    mixed[1::2] = -int8.QMAX
    expected = int8.multiply(largest, mixed)
    return _int_mm if torch.equal(_int_mm(largest, mixed), expected) else int8.multiply


def _int_mm(act_qdata: Tensor, weight_qdata: Tensor) -> Tensor:
    return torch._int_mm(act_qdata, weight_qdata.t())
