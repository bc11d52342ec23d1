"""Define a linear layer whose HiFloat8 weights were decoded once, and stay BF16 numbers.

Where a device multiplies in BF16 anyway, `Hif8Linear` decodes its codes for every product. This
layer spends twice the memory instead, and its products have the very same bits: the weights are
the numbers that the codes stand for, times their scale.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from quant.numerics import reference
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import ScalePolicy


class GridLinear(nn.Linear):
    """y = fake_quantize(x) @ weightᵀ + bias, x [..., K] → y [..., N]; no gradients.

    Parameters:
        weight: [N, K] bf16, on the grid of HiFloat8 under the scale that its codes had.
        bias: [N] or None, shared with the layer it was made of.

    Buffers:
        act_scale: [] float32, the static scale of the inputs; None if each token has its own.
    """

    act_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        *,
        act_scale: Tensor | None,
        act_policy: ScalePolicy,
        bias: nn.Parameter | None,
    ) -> None:
        """Create the layer; `act_scale` and `act_policy` as in `Hif8Linear`."""
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # nn.Linear's own type for "no bias"
        self.register_buffer("act_scale", act_scale)
        self.act_policy = act_policy

    @classmethod
    def from_hif8(cls, linear: Hif8Linear) -> Self:
        """Decode a layer's weights, on their device; bias and scale of the inputs are shared."""
        return cls(
            linear.dequantized_weight(torch.bfloat16),
            act_scale=linear.act_scale,
            act_policy=linear.act_policy,
            bias=linear.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., K] bf16 → [..., N] bf16."""
        if self.act_scale is None:
            x = reference.fake_quantize_per_token(x, self.act_policy)
        else:
            x = reference.fake_quantize(x, self.act_scale)
        return reference.product(x, self.weight, self.bias)
