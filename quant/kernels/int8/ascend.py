"""Compute INT8 linears that share their input as one product of an Ascend NPU's cube units.

`npu_dynamic_quant` rounds each token to codes under its own amax / 127, `npu_quant_matmul`
multiplies them and applies both scales and the bias. Their documentation gives the formulas of
`quant.numerics.int8`; how they round a tie, and what they make of a token of zeros or of NaN, it
does not say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.errors import ConversionError
from quant.kernels.int8.product import Int8Product
from quant.numerics.int8_linear import Int8Linear

LARGEST_SIDE = 65_535
"""The largest last dimension that `npu_quant_matmul` takes: inputs and outputs of a product."""


class AscendInt8Product(Int8Product):
    """The same product on an NPU.

    Buffers:
        weight: [K, N] int8, contiguous as the operation reads it fastest.
        weight_scale: [N] float32.
    """

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        """Take over the weights of linears.

        Raises:
            ConversionError: a side is larger than the operation takes.
        """
        super().__init__(linears)
        if max(self.weight.shape) > LARGEST_SIDE:
            raise ConversionError(
                f"INT8 products on an NPU have at most {LARGEST_SIDE} inputs and outputs, and this "
                f"one has {self.weight.shape[1]} and {self.weight.shape[0]}: keep it in BF16 with "
                "kept_linears"
            )
        self.weight = self.weight.t().contiguous()
        self.weight_scale = self.weight_scale.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        import torch_npu  # noqa: PLC0415 (its import claims the process's accelerator)

        rows = x.reshape(-1, x.shape[-1])
        qdata, scale = torch_npu.npu_dynamic_quant(rows)
        out: Tensor = torch_npu.npu_quant_matmul(
            qdata,
            self.weight,
            self.weight_scale,
            pertoken_scale=scale,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return out.view(*x.shape[:-1], -1)
