"""Define a linear layer with INT8 weights that quantizes its inputs token by token.

It replaces `nn.Linear` at inference, like `quant.numerics.linear.Hif8Linear`. They have the names
of their tensors in common, and nothing else: codes, scales and products differ.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from quant.numerics import int8


class Int8Linear(nn.Module):
    """The product of `quant.numerics.int8.linear`, x [..., K] → y [..., N].

    Buffers:
        weight_qdata: [N, K] int8.
        weight_scale: [N, 1] float32, what the codes of each output channel are multiplied by.

    Parameters:
        bias: [N] in the model's dtype, shared with the source linear; or None.

    Its inputs have no static scale: each token gets its own while the model runs.
    """

    weight_qdata: Tensor
    weight_scale: Tensor
    act_scale: None = None
    bias: nn.Parameter | None

    def __init__(
        self, weight_qdata: Tensor, weight_scale: Tensor, *, bias: nn.Parameter | None
    ) -> None:
        """Create the layer from quantized weights.

        Raises:
            TypeError: weight_qdata is not int8.
            ValueError: weight_scale has another shape than [N, 1].
        """
        super().__init__()
        if weight_qdata.dtype is not torch.int8:
            raise TypeError(f"weight_qdata holds codes in torch.int8, not {weight_qdata.dtype}")
        self.out_features, self.in_features = weight_qdata.shape
        if weight_scale.shape != (self.out_features, 1):
            raise ValueError(
                f"weight_scale is [{self.out_features}, 1], not {list(weight_scale.shape)}"
            )
        self.register_buffer("weight_qdata", weight_qdata)
        self.register_buffer("weight_scale", weight_scale)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight_scale: Tensor, name: str = "a linear") -> Self:
        """Quantize a linear's weights under `weight_scale`, on their device; the bias is shared.

        Args:
            name: the linear's name, for the message.

        Raises:
            ConversionError: a weight is NaN or infinite.
        """
        weight = linear.weight.detach()
        weight_scale = weight_scale.to(weight.device, copy=True)
        qdata = int8.quantize_weight(weight, weight_scale, name)
        return cls(qdata, weight_scale, bias=linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., K] → [..., N] in the dtype of x."""
        return int8.linear(x, self.weight_qdata, self.weight_scale, self.bias)

    def dequantized_weight(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the dequantized weights: [N, K] dtype."""
        return int8.dequantize(self.weight_qdata, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        """Return the text that `print(module)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act=INT8 per token"
        )
