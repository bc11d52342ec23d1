"""Calibrate: run the BF16 pipeline over prompts and choose the scales of a recipe.

The prompts run through the whole pipeline as a job would, guidance included, so the linears see
what they will see in service; only the VAE is left out. The result is a `Scales` to save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.act_statistics import (
    ActivationStatistics,
    InputOf,
    OutputOf,
    Point,
    RotaryPairsOf,
)
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import Scales
from quant.device import usable_device
from quant.errors import CalibrationError
from quant.numerics.granularity import PerChannel, PerToken
from quant.numerics.scaling import binade_histogram, choose_scale
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears

OnPrompt = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What to calibrate, for what, and with what.

    Attributes:
        model_fingerprint: of the folder the pipeline is loaded from (`quant.weights.fingerprint`).
    """

    model_fingerprint: str
    recipe: QuantRecipe
    prompts: PromptSet
    sampler: SamplerSettings


def load_pipeline(model_folder: Path, device: str) -> Any:
    """Load a `WanPipeline` in BF16 onto a device.

    Raises:
        CalibrationError: the folder does not load.
        QuantError: the device cannot be used.
    """
    if not (model_folder / "model_index.json").is_file():
        raise CalibrationError(
            f"{model_folder} holds no model_index.json: give the folder of a WanPipeline "
            "in diffusers format"
        )
    on = usable_device(device)
    # Takes seconds to import, so only when a model is really loaded.
    from diffusers import WanPipeline  # noqa: PLC0415

    try:
        pipe = WanPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model_folder} does not load as a WanPipeline: {error}") from error
    return pipe.to(on)


def run_calibration(
    pipe: Any, plan: CalibrationPlan, on_prompt: OnPrompt = lambda done, total: None
) -> Scales:
    """Run the plan's prompts through a BF16 `WanPipeline` and choose scales.

    Args:
        on_prompt: called after each prompt with (done, total).

    Raises:
        CalibrationError: a prompt is too long, or a linear saw a value that is not finite.
        ConversionError: the recipe does not fit the transformer.
    """
    _check_prompt_lengths(pipe, plan)
    pipe.set_progress_bar_config(disable=True)

    def run(index: int, statistics: ActivationStatistics) -> None:
        _run_prompt(pipe, plan.sampler, index, plan.prompts.prompts[index], statistics)
        on_prompt(index + 1, len(plan.prompts.prompts))

    return calibrate_transformer(pipe.transformer, plan, run)


def calibrate_transformer(
    transformer: Any, plan: CalibrationPlan, run: Callable[[int, ActivationStatistics], None]
) -> Scales:
    """Choose scales from what a BF16 transformer sees while `run` runs each prompt through it.

    Args:
        run: is given the prompt's number; it tells the statistics of each timestep group it enters.

    Raises:
        CalibrationError: a linear saw a value that is not finite.
        ConversionError: the recipe does not fit the transformer.
    """
    linears = select_linears(transformer, plan.recipe)
    points = _points(transformer, linears, plan.recipe)
    statistics = ActivationStatistics(
        list(points.values()),
        plan.sampler.timestep_groups,
        len(plan.prompts.prompts),
        transformer.device,
    )
    with statistics.watching(), torch.no_grad():
        for index, prompt in enumerate(plan.prompts.prompts):
            statistics.begin(index)
            run(index, statistics)
            _check_finite(statistics, index, list(points), prompt)
    return _scales(plan, linears, statistics)


def tool_version() -> str:
    """The installed version of this distribution."""
    try:
        return version("wan-hif8")
    except PackageNotFoundError:
        return "not installed"


def _points(
    transformer: Any, linears: Mapping[str, nn.Linear], recipe: QuantRecipe
) -> dict[str, Point]:
    """What is watched, by name: the inputs of the linears, then what FP8 attention takes."""
    points: dict[str, Point] = {name: InputOf(linear) for name, linear in linears.items()}
    for name in recipe.attention_inputs:
        module, _, part = name.rpartition(".")
        attention = transformer.get_submodule(module)
        if part == "v":
            points[name] = OutputOf(attention.to_v)
        else:
            points[name] = RotaryPairsOf(attention.get_submodule(f"norm_{part}"))
    return points


def _scales(
    plan: CalibrationPlan, linears: Mapping[str, nn.Linear], statistics: ActivationStatistics
) -> Scales:
    """Choose the scales; the rows of the statistics are as `_points` names them."""
    recipe, count = plan.recipe, len(linears)
    amax, binades = statistics.amax.cpu(), statistics.binades.cpu()
    chosen = choose_scale(recipe.act_policy, amax.amax((1, 2)), binades.sum(1))
    # Clones: safetensors refuses tensors that share one storage.
    act_scale = dict(zip(linears, (scale.clone() for scale in chosen[:count]), strict=True))
    attention = zip(recipe.attention_inputs, (x.clone() for x in chosen[count:]), strict=True)
    return Scales(
        model_fingerprint=plan.model_fingerprint,
        recipe=recipe,
        prompts_sha256=plan.prompts.sha256,
        prompts_file=plan.prompts.file,
        sampler=plan.sampler,
        tool_version=tool_version(),
        linears=tuple(linears),
        weight_scale={
            name: _weight_scale(linear.weight.detach(), recipe).cpu()
            for name, linear in linears.items()
        },
        act_scale={} if isinstance(recipe.act_granularity, PerToken) else act_scale,
        weight_amax=torch.stack([_amax(linear) for linear in linears.values()]).cpu(),
        act_amax=amax[:count].clone(),
        act_mean_square=statistics.mean_square[:count].clone(),
        act_binades=binades[:count].clone(),
        attention_scale=dict(attention),
        attention_amax=amax[count:].clone(),
        attention_mean_square=statistics.mean_square[count:].clone(),
        attention_binades=binades[count:].clone(),
    )


def _run_prompt(
    pipe: Any,
    sampler: SamplerSettings,
    index: int,
    prompt: str,
    statistics: ActivationStatistics,
) -> None:
    def after_step(
        _pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if step + 1 < sampler.num_inference_steps:
            statistics.enter(sampler.group_of_step(step + 1))
        return tensors

    width, height = sampler.size
    statistics.enter(0)
    pipe(
        prompt=prompt,
        negative_prompt=sampler.negative_prompt,
        width=width,
        height=height,
        num_frames=sampler.num_frames,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        max_sequence_length=sampler.text_tokens,
        generator=torch.Generator("cpu").manual_seed(sampler.seed + index),
        output_type="latent",
        callback_on_step_end=after_step,
    )


def _check_prompt_lengths(pipe: Any, plan: CalibrationPlan) -> None:
    """Refuse prompts the pipeline would cut without a word."""
    limit = plan.sampler.text_tokens
    for prompt in (plan.sampler.negative_prompt, *plan.prompts.prompts):
        tokens = len(pipe.tokenizer(prompt)["input_ids"])
        if tokens > limit:
            raise CalibrationError(
                f"prompt {prompt!r} has {tokens} tokens, the limit is {limit}: shorten it or raise "
                "--text-tokens"
            )


def _check_finite(
    statistics: ActivationStatistics, prompt_index: int, names: list[str], prompt: str
) -> None:
    finite = statistics.amax[:, :, prompt_index].isfinite().all(dim=1)
    if not finite.all():
        name = names[int((~finite).nonzero()[0])]
        raise CalibrationError(
            f"{name} saw NaN or infinity on prompt {prompt!r}: no scale describes that; check the "
            "model's weights"
        )


def _amax(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().abs().amax().float()


def _weight_scale(weight: Tensor, recipe: QuantRecipe) -> Tensor:
    """weight [N, K] → [] or [N, 1] float32."""
    per_channel = isinstance(recipe.weight_granularity, PerChannel)
    rows = weight if per_channel else weight.reshape(1, -1)
    binades = binade_histogram(rows) if recipe.weight_policy.needs_binades else None
    scale = choose_scale(recipe.weight_policy, rows.abs().amax(1), binades)
    return scale.unsqueeze(1) if per_channel else scale.squeeze(0)
