"""Choose the quantized linear of a recipe's number format, and make its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.numerics import int8, reference
from quant.numerics.granularity import PerChannel, PerToken
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear
from quant.recipe.recipe import QuantRecipe

QuantizedLinear = Hif8Linear | Int8Linear


def quantized_linear(
    name: str,
    linear: nn.Linear,
    recipe: QuantRecipe,
    weight_scale: Tensor,
    act_scale: Tensor | None,
) -> QuantizedLinear:
    """Quantize a linear on its weights' device; the bias is shared.

    Args:
        name: the linear's full name, for messages.
        act_scale: the static scale of its inputs; None where each token gets its own.

    Raises:
        ConversionError: a weight is NaN or infinite, and the format has no code for it.
    """
    if recipe.format == "int8":
        return Int8Linear.from_linear(linear, weight_scale, name)
    return Hif8Linear.from_linear(
        linear, weight_scale, act_scale=act_scale, act_policy=recipe.act_policy
    )


def empty_linear(linear: nn.Linear, recipe: QuantRecipe) -> QuantizedLinear:
    """Build the same on the meta device, without weights; the bias is shared."""
    rows = (linear.out_features, 1) if isinstance(recipe.weight_granularity, PerChannel) else ()
    per_token = isinstance(recipe.act_granularity, PerToken)
    weight_scale = torch.empty(rows, dtype=torch.float32, device="meta")
    if recipe.format == "int8":
        qdata = torch.empty(linear.weight.shape, dtype=torch.int8, device="meta")
        return Int8Linear(qdata, weight_scale, bias=linear.bias)
    return Hif8Linear(
        torch.empty(linear.weight.shape, dtype=torch.uint8, device="meta"),
        weight_scale,
        act_scale=None if per_token else torch.empty((), dtype=torch.float32, device="meta"),
        act_policy=recipe.act_policy,
        bias=linear.bias,
    )


def quantize_weight(name: str, weight: Tensor, scale: Tensor, recipe: QuantRecipe) -> Tensor:
    """Quantize the weights of one linear alone: weight [N, K] → qdata [N, K], one byte each.

    Raises:
        ConversionError: as for `quantized_linear`.
    """
    if recipe.format == "int8":
        return int8.quantize_weight(weight, scale, name)
    return reference.quantize(weight, scale)
