"""Define a linear layer with HiFloat8 codes as weights and inputs rounded to HiFloat8.

It replaces `nn.Linear` at inference. It is a module rather than a tensor subclass because only the
matrix product has to know the format, and because a module's tensors appear in its state dict.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from quant.numerics import reference
from quant.numerics.scaling import ScalePolicy


class Hif8Linear(nn.Module):
    """y = fake_quantize(x) @ decode(weight_qdata)ᵀ · weight_scale + bias, x [..., K] → y [..., N].

    Buffers:
        weight_qdata: [N, K] uint8, HiFloat8 codes.
        weight_scale: [] or [N, 1] float32, what the codes are multiplied by.
        act_scale: [] float32, the static scale of the inputs; None if each token has its own.

    Parameters:
        bias: [N] in the model's dtype, shared with the source linear; or None.

    Converting the module to BF16 keeps power-of-two scales exact and rounds other scales.
    """

    weight_qdata: Tensor
    weight_scale: Tensor
    act_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight_qdata: Tensor,
        weight_scale: Tensor,
        *,
        act_scale: Tensor | None,
        act_policy: ScalePolicy,
        bias: nn.Parameter | None,
    ) -> None:
        """Create the layer from quantized weights.

        Args:
            act_policy: how `act_scale` was chosen, or, if that is None, how each token's scale is.

        Raises:
            TypeError: weight_qdata is not uint8.
            ValueError: a shape is wrong, or the policy cannot choose scales per token.
        """
        super().__init__()
        if weight_qdata.dtype is not torch.uint8:
            raise TypeError(f"weight_qdata holds codes in torch.uint8, not {weight_qdata.dtype}")
        self.out_features, self.in_features = weight_qdata.shape
        if weight_scale.shape not in ((), (self.out_features, 1)):
            raise ValueError(
                f"weight_scale is [] or [{self.out_features}, 1], not {list(weight_scale.shape)}"
            )
        if act_scale is not None and act_scale.shape != ():
            raise ValueError(f"act_scale is [], not {list(act_scale.shape)}")
        if act_scale is None and act_policy.needs_binades:
            raise ValueError(f"policy {act_policy.name} cannot choose scales per token")
        self.register_buffer("weight_qdata", weight_qdata)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("act_scale", act_scale)
        self.register_parameter("bias", bias)
        self.act_policy = act_policy

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_scale: Tensor,
        *,
        act_scale: Tensor | None,
        act_policy: ScalePolicy,
    ) -> Self:
        """Quantize a linear's weights under `weight_scale`, on their device; the bias is shared."""
        weight = linear.weight.detach()
        weight_scale = weight_scale.to(weight.device, copy=True)
        return cls(
            reference.quantize(weight, weight_scale),
            weight_scale,
            act_scale=None if act_scale is None else act_scale.to(weight.device, copy=True),
            act_policy=act_policy,
            bias=linear.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., K] → [..., N] in the dtype of x."""
        if self.act_scale is None:
            x = reference.fake_quantize_per_token(x, self.act_policy)
        else:
            x = reference.fake_quantize(x, self.act_scale)
        return reference.linear(x, self.weight_qdata, self.weight_scale, self.bias)

    def dequantized_weight(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the dequantized weights: [N, K] dtype."""
        return reference.dequantize(self.weight_qdata, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        """Return the text that `print(module)` shows."""
        act = f"static ({self.act_policy.name})"
        if self.act_scale is None:
            act = f"per token ({self.act_policy.name})"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act={act}"
        )
