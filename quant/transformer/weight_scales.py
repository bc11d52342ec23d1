"""Choose the scales of a recipe that needs no prompts, from a model's weights alone.

An INT8 recipe rounds each token under a scale that is found while the model runs, so only its
weights have scales to be chosen. They are read one by one, and nothing is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from quant.calibration.calibrate import tool_version, weight_scale
from quant.calibration.scales import Scales
from quant.errors import CalibrationError
from quant.numerics.scaling import NUM_BINADES
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.lora.merge import NO_LORAS, LoraSet
from quant.transformer.meta_model import check_stored, empty_transformer
from quant.weights.fingerprint import model_fingerprint, read_transformer_config
from quant.weights.reader import TensorReader
from quant.weights.weight_files import stored_weights


def scales_of_weights(
    model_folder: Path,
    recipe: QuantRecipe,
    device: torch.device,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    loras: LoraSet = NO_LORAS,
) -> Scales:
    """Choose the scales of every linear that `recipe` quantizes.

    The result has no prompts, no sampler and no statistics of activations.

    Args:
        device: where the largest values are searched.
        on_tensor: called after each linear with (done, total).
        loras: merged before scales are chosen.

    Raises:
        CalibrationError: the recipe has static scales of activations, or a weight is not finite.
        ConversionError: the recipe does not fit the transformer.
        WeightsError: the model's files cannot be read, or do not fit its configuration.
    """
    if recipe.needs_prompts:
        raise CalibrationError(
            f"recipe {recipe.name!r} has static scales of activations, which only a run over "
            "prompts gives: give --prompts"
        )
    fingerprint = loras.fingerprint(model_fingerprint(model_folder))
    transformer = empty_transformer(read_transformer_config(model_folder))
    linears = select_linears(transformer, recipe)
    folder = model_folder / "transformer"
    stored = stored_weights(folder)
    check_stored(transformer.state_dict(), stored, source=str(folder), exact=False)
    reader = TensorReader(torch.device("cpu"))
    scales, amax = {}, []
    for done, (name, linear) in enumerate(linears.items(), start=1):
        weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype)
        reader.read([(stored[f"{name}.weight"], weight)])
        weight = loras.merged(f"{name}.weight", weight.to(device))
        amax.append(weight.abs().amax().float().cpu())
        if not amax[-1].isfinite():
            raise CalibrationError(
                f"the weights of {name} hold NaN or infinity, which no scale describes: the "
                "model's files are damaged; copy them again"
            )
        scales[name] = weight_scale(weight, recipe).cpu()
        on_tensor(done, len(linears))
    count = len(linears)
    return Scales(
        model_fingerprint=fingerprint,
        recipe=recipe,
        prompts_sha256=hashlib.sha256(b"").hexdigest(),
        prompts_file="",
        sampler=None,
        tool_version=tool_version(),
        linears=tuple(linears),
        weight_scale=scales,
        act_scale={},
        weight_amax=torch.stack(amax),
        act_amax=torch.zeros(count, 0, 0),
        act_mean_square=torch.zeros(count, 0, 0),
        act_binades=torch.zeros(count, 0, NUM_BINADES),
        attention_scale={},
        attention_amax=torch.zeros(0, 0, 0),
        attention_mean_square=torch.zeros(0, 0, 0),
        attention_binades=torch.zeros(0, 0, NUM_BINADES),
    )
