"""Compute INT8 linears that share their input as one product of an NVIDIA GPU's tensor cores.

`torch._int_mm` takes more than 16 rows, and sides that are multiples of 8: weights are padded once,
few rows while it runs. Its sums are 32-bit integers, twice the bytes of the outputs, so a long
input is multiplied in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.int8 import triton_rows
from quant.kernels.int8.product import Int8Product
from quant.numerics.int8_linear import Int8Linear

FEWEST_ROWS = 32
SIDE_MULTIPLE = 8
SUMS = 1 << 26
"""Sums that exist at a time: a quarter of a GiB."""


class CudaInt8Product(Int8Product):
    """The same product on a GPU.

    Buffers:
        weight: [N, K] int8, both padded with zeros to multiples of 8.
        weight_scale: [N, 1] float32, not padded.
    """

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        super().__init__(linears)
        outputs, inputs = (-side % SIDE_MULTIPLE for side in self.weight.shape)
        if outputs or inputs:
            self.weight = pad(self.weight, (0, inputs, 0, outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(
            rows.shape[0], self.weight_scale.shape[0], dtype=torch.bfloat16, device=x.device
        )
        step = max(FEWEST_ROWS, SUMS // self.weight.shape[0])
        for piece, target in zip(torch.split(rows, step), torch.split(out, step), strict=True):
            self._multiply(piece.contiguous(), target)
        return out.view(*x.shape[:-1], -1)

    def _multiply(self, rows: Tensor, out: Tensor) -> None:
        count, inputs = rows.shape
        padded = max(count, FEWEST_ROWS), self.weight.shape[1]
        if inputs != padded[1]:
            rows = pad(rows, (0, padded[1] - inputs))
        qdata = rows.new_empty(padded, dtype=torch.int8)
        qdata[count:].zero_()
        act_scale = triton_rows.quantize(rows, qdata)
        sums = torch._int_mm(qdata, self.weight.t())
        triton_rows.rescale(sums, act_scale, self.weight_scale, self.bias, out)
