"""Build a quantized copy of a transformer that shares every tensor that is not quantized.

The copy is a second module tree. Its modules and its quantized linears are new; norms, embeddings,
biases and protected blocks use the same tensor objects as the source tree. Both trees can run in
turn on one device, and need the memory of one model plus the 8-bit weights.

The conversion is checked against the recipe, linear by linear. A pattern that matches nothing, a
block with another number of linears or a transformer with another number of blocks is an error,
never a smaller conversion.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from quant.calibration.scales import Scales
from quant.errors import ConversionError
from quant.numerics.granularity import PerToken
from quant.numerics.metrics import sqnr_db
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.conversion_report import ConversionReport, ConvertedLinear, weight_bytes
from quant.transformer.module_tree import M, share_tree
from quant.transformer.quantized_linear import QuantizedLinear, quantized_linear


def quantize_transformer(
    transformer: M, recipe: QuantRecipe, scales: Scales
) -> tuple[M, ConversionReport]:
    """Build a quantized copy that shares every tensor it does not quantize with `transformer`.

    Call `quant.check_scales` first, because this function only looks scales up by name. The source
    tree is not changed.

    Raises:
        ConversionError: the recipe does not fit, a scale is missing, the tree carries hooks, or a
            weight is NaN or infinite and the recipe's format has no code for it.
    """
    targets = select_linears(transformer, recipe)
    require_scales(targets, recipe, scales)
    rows: list[ConvertedLinear] = []

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if name not in targets:
            return None
        quantized = quantized_linear(
            name, targets[name], recipe, scales.weight_scale[name], scales.act_scale.get(name)
        )
        rows.append(_row(name, targets[name], quantized))
        return quantized

    quantized_copy = share_tree(transformer, convert)
    report = ConversionReport(
        rows=tuple(rows),
        blocks=len(recipe.quantized_blocks),
        total_blocks=recipe.total_blocks,
        weight_bytes=weight_bytes(quantized_copy),
        source_weight_bytes=weight_bytes(transformer),
    )
    return quantized_copy, report


def require_scales(targets: Iterable[str], recipe: QuantRecipe, scales: Scales) -> None:
    """Check that there are scales for every linear that a recipe quantizes.

    Raises:
        ConversionError: a linear has none; the message names the first one.
    """
    names = list(targets)
    known = set(scales.weight_scale)
    if not isinstance(recipe.act_granularity, PerToken):
        known &= set(scales.act_scale)
    missing = [name for name in names if name not in known]
    if missing:
        raise ConversionError(
            f"the scales have none for {len(missing)} of {len(names)} linears, "
            f"the first being {missing[0]}: calibrate again with recipe {recipe.name!r}"
        )


def _row(name: str, linear: nn.Linear, quantized: QuantizedLinear) -> ConvertedLinear:
    _, block, kind = name.split(".", 2)
    weight: Tensor = linear.weight.detach()
    return ConvertedLinear(
        block=int(block),
        kind=kind,
        out_features=linear.out_features,
        in_features=linear.in_features,
        weight_scale=quantized.weight_scale.max().item(),
        act_scale=None if quantized.act_scale is None else quantized.act_scale.item(),
        weight_sqnr_db=sqnr_db(weight, quantized.dequantized_weight(weight.dtype)),
    )
