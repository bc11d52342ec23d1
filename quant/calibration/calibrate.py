"""Calibrate: run the BF16 pipeline over prompts and choose the scales of a recipe.

The prompts run through the complete pipeline as in a job, guidance included, so the linears get
the same kind of input as in service. Only the VAE is left out. The result is a `Scales` to save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.act_statistics import (
    ActivationStatistics,
    ModuleInput,
    ModuleOutput,
    ObservedTensor,
    RotaryPairs,
)
from quant.calibration.checkpoint import Checkpoint
from quant.calibration.convergence import WINDOW, Convergence, check_convergence
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.sampling import OnStep, check_pipeline, run_prompt
from quant.calibration.scales import Scales
from quant.errors import CalibrationError
from quant.numerics.granularity import PerChannel, PerToken
from quant.numerics.scaling import binade_histogram, choose_scale
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears

OnLatents = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """The model, recipe, prompts and settings of a calibration.

    Attributes:
        model_fingerprint: of the folder the pipeline is loaded from (`quant.weights.fingerprint`).
        until: end before the last prompt, once this share of scales is settled
            (`quant.calibration.convergence`); None runs all prompts.
    """

    model_fingerprint: str
    recipe: QuantRecipe
    prompts: PromptSet
    sampler: SamplerSettings
    until: float | None = None

    def identity(self, device: torch.device) -> dict[str, str]:
        """Return what the statistics of a run on `device` depend on, by its name for people."""
        return {
            "model": self.model_fingerprint,
            "recipe": self.recipe.fingerprint,
            "set of prompts": self.prompts.sha256,
            "setting of the sampler": json.dumps(self.sampler.to_dict()),
            "device": device.type,
            "version of torch": torch.__version__,
            "version of this tool": tool_version(),
        }


def run_calibration(
    pipe: Any,
    plan: CalibrationPlan,
    on_step: OnStep = lambda done, total: None,
    checkpoint: Checkpoint | None = None,
    on_latents: OnLatents = lambda latents: None,
) -> Scales:
    """Run the plan's prompts through a BF16 `WanPipeline` and choose scales.

    Args:
        on_step: called after each denoising step with (done, total), counted over all prompts;
            before the first one, too, with the steps that the checkpoint holds.
        checkpoint: where to keep what was measured, prompt by prompt, and to go on from. It is left
            for the caller to delete, once the scales are safe.
        on_latents: called with the normalized latents [1, C, F, H, W] of each video.

    Raises:
        CalibrationError: as `check_pipeline`; or an observed tensor is not finite, the checkpoint
            is of another calibration, or the plan's `until` does not go with its recipe.
        ConversionError: the recipe does not fit the transformer.
    """
    check_pipeline(pipe, plan.prompts.prompts, plan.sampler)
    pipe.set_progress_bar_config(disable=True)

    steps = plan.sampler.num_inference_steps
    total = steps * len(plan.prompts.prompts)
    names = observed_names(pipe.transformer, plan.recipe)

    def run(index: int, statistics: ActivationStatistics) -> None:
        def after_step(step: int) -> None:
            _check_finite(statistics, names, plan.prompts.prompts[index], step)
            if step + 1 < steps:
                statistics.enter(plan.sampler.group_of_step(step + 1))
            on_step(index * steps + step + 1, total)

        statistics.enter(0)
        on_latents(run_prompt(pipe, plan.prompts, plan.sampler, index, after_step))

    def on_begin(done: int) -> None:
        on_step(done * steps, total)

    return calibrate_transformer(pipe.transformer, plan, run, checkpoint, on_begin)


def calibrate_transformer(
    transformer: Any,
    plan: CalibrationPlan,
    run: Callable[[int, ActivationStatistics], None],
    checkpoint: Checkpoint | None = None,
    on_begin: Callable[[int], None] = lambda done: None,
) -> Scales:
    """Choose scales from the activations of a BF16 transformer while `run` runs each prompt.

    Args:
        run: called with the prompt's number and the statistics. It calls `statistics.enter` for
            each timestep group that begins.
        checkpoint: where to keep what was measured, prompt by prompt, and to go on from.
        on_begin: called once with the number of prompts that the checkpoint holds.

    Raises:
        CalibrationError: an observed tensor is not finite, or the checkpoint is of another
            calibration.
        ConversionError: the recipe does not fit the transformer.
    """
    if plan.until is not None:
        check_convergence(plan.recipe)
    linears = select_linears(transformer, plan.recipe)
    tensors = _observed_tensors(transformer, linears, plan.recipe)
    statistics = ActivationStatistics(
        list(tensors.values()),
        plan.sampler.timestep_groups,
        len(plan.prompts.prompts),
        transformer.device,
    )
    identity = plan.identity(transformer.device)
    done = checkpoint.restore(statistics, identity) if checkpoint is not None else 0
    on_begin(done)
    with statistics.observing(), torch.no_grad():
        while not _is_enough(plan, statistics, done):
            statistics.begin(done)
            run(done, statistics)
            _check_finite(statistics, list(tensors), plan.prompts.prompts[done])
            done += 1
            if checkpoint is not None:
                checkpoint.save(statistics, done, identity)
    return _scales(replace(plan, prompts=plan.prompts.first(done)), linears, statistics)


def _is_enough(plan: CalibrationPlan, statistics: ActivationStatistics, done: int) -> bool:
    """Return whether no further prompt is to be run after the first `done`."""
    if done == len(plan.prompts.prompts):
        return True
    if plan.until is None or done <= WINDOW:
        return False
    return Convergence.of(plan.recipe, statistics.amax[:, :, :done].cpu()).is_reached(plan.until)


def observed_names(transformer: Any, recipe: QuantRecipe) -> list[str]:
    """Return the names of what a calibration observes, in the order of its statistics.

    Raises:
        ConversionError: the recipe does not fit the transformer.
    """
    return [*select_linears(transformer, recipe), *recipe.attention_inputs]


def tool_version() -> str:
    """Return the installed version of this distribution."""
    try:
        return version("wan-hif8")
    except PackageNotFoundError:
        return "not installed"


def _observed_tensors(
    transformer: Any, linears: Mapping[str, nn.Linear], recipe: QuantRecipe
) -> dict[str, ObservedTensor]:
    """Return what is observed, by name: the linears' inputs, then the inputs of FP8 attention."""
    tensors: dict[str, ObservedTensor] = {
        name: ModuleInput(linear) for name, linear in linears.items()
    }
    for name in recipe.attention_inputs:
        module, _, part = name.rpartition(".")
        attention = transformer.get_submodule(module)
        if part == "v":
            tensors[name] = ModuleOutput(attention.to_v)
        else:
            tensors[name] = RotaryPairs(attention.get_submodule(f"norm_{part}"))
    return tensors


def _scales(
    plan: CalibrationPlan, linears: Mapping[str, nn.Linear], statistics: ActivationStatistics
) -> Scales:
    """Choose the scales; the rows of the statistics are in the order of `_observed_tensors`."""
    recipe, count = plan.recipe, len(linears)
    prompts = len(plan.prompts.prompts)
    amax, binades = statistics.amax[:, :, :prompts].cpu(), statistics.binades.cpu()
    mean_square = statistics.mean_square[:, :, :prompts]
    chosen = choose_scale(recipe.act_policy, amax.amax((1, 2)), binades.sum(1))
    # Clones, because safetensors rejects tensors that share one storage.
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
            name: weight_scale(linear.weight.detach(), recipe).cpu()
            for name, linear in linears.items()
        },
        act_scale={} if isinstance(recipe.act_granularity, PerToken) else act_scale,
        weight_amax=torch.stack([_amax(linear) for linear in linears.values()]).cpu(),
        act_amax=amax[:count].clone(),
        act_mean_square=mean_square[:count].clone(),
        act_binades=binades[:count].clone(),
        attention_scale=dict(attention),
        attention_amax=amax[count:].clone(),
        attention_mean_square=mean_square[count:].clone(),
        attention_binades=binades[count:].clone(),
    )


def _check_finite(
    statistics: ActivationStatistics, names: list[str], prompt: str, step: int | None = None
) -> None:
    """Refuse NaN and infinity in the present timestep group; names are in the order of a pass."""
    wrong = statistics.not_finite()
    if wrong.any():
        where = "" if step is None else f" in step {step + 1}"
        raise CalibrationError(
            f"{names[int(wrong.nonzero()[0])]} saw NaN or infinity{where} of prompt {prompt!r}, "
            "the first of all that are observed: no scale describes that; the weights are finite, "
            "so what the blocks before it compute overflows"
        )


def _amax(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().abs().amax().float()


def weight_scale(weight: Tensor, recipe: QuantRecipe) -> Tensor:
    """Choose the scale from the weights themselves: weight [N, K] → [] or [N, 1] float32."""
    per_channel = isinstance(recipe.weight_granularity, PerChannel)
    rows = weight if per_channel else weight.reshape(1, -1)
    binades = binade_histogram(rows) if recipe.weight_policy.needs_binades else None
    scale = choose_scale(recipe.weight_policy, rows.abs().amax(1), binades)
    return scale.unsqueeze(1) if per_channel else scale.squeeze(0)
