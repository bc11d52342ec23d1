"""Run prompts through a `WanPipeline` in BF16 as a job would, up to the latents of their videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.device import usable_device
from quant.errors import CalibrationError
from quant.weights.model_folder import check_model_kind

OnStep = Callable[[int, int], None]


def load_pipeline(model_folder: Path, device: str) -> Any:
    """Load a `WanPipeline` in BF16 onto a device.

    Raises:
        CalibrationError: the folder does not load.
        WeightsError: it holds another kind of model than Wan2.1 text-to-video.
        QuantError: the device cannot be used.
    """
    if not (model_folder / "model_index.json").is_file():
        raise CalibrationError(
            f"{model_folder} holds no model_index.json: give the folder of a WanPipeline "
            "in diffusers format"
        )
    check_model_kind(model_folder)
    target = usable_device(device)
    # Takes seconds to import, so it is imported only when a model is really loaded.
    from diffusers import WanPipeline  # noqa: PLC0415

    try:
        pipe = WanPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model_folder} does not load as a WanPipeline: {error}") from error
    return pipe.to(target)


def make_latents(
    pipe: Any, prompts: PromptSet, sampler: SamplerSettings, count: int, on_step: OnStep
) -> list[Tensor]:
    """Run the first prompts through a `WanPipeline`; return the latents of their videos.

    Args:
        count: how many prompts.
        on_step: called after each denoising step with (done, total), counted over all of them.

    Returns:
        For each prompt [1, C, F, H, W], normalized, on the host.

    Raises:
        CalibrationError: a prompt is too long, or there are fewer than `count`.
    """
    if count > len(prompts.prompts):
        raise CalibrationError(
            f"{prompts.file} holds {len(prompts.prompts)} prompts, fewer than the {count} videos "
            "asked for: add prompts, or ask for fewer videos"
        )
    check_prompt_lengths(pipe, prompts.prompts[:count], sampler)
    pipe.set_progress_bar_config(disable=True)
    steps, found = sampler.num_inference_steps, list[Tensor]()
    for index in range(count):

        def after_step(step: int, done: int = index * steps) -> None:
            on_step(done + step + 1, count * steps)

        found.append(run_prompt(pipe, prompts, sampler, index, after_step).cpu())
    return found


def run_prompt(
    pipe: Any,
    prompts: PromptSet,
    sampler: SamplerSettings,
    index: int,
    after_step: Callable[[int], None],
) -> Tensor:
    """Run one prompt of a set; return the latents of its video, [1, C, F, H, W] normalized.

    Args:
        index: number of the prompt in its set, which also determines the seed.
        after_step: called after each denoising step with its number.
    """

    def on_step_end(
        _pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        after_step(step)
        return tensors

    width, height = sampler.size
    latents: Tensor = pipe(
        prompt=prompts.prompts[index],
        negative_prompt=sampler.negative_prompt,
        width=width,
        height=height,
        num_frames=sampler.num_frames,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        max_sequence_length=sampler.text_tokens,
        generator=torch.Generator("cpu").manual_seed(sampler.seed + index),
        output_type="latent",
        callback_on_step_end=on_step_end,
    ).frames
    return latents


def check_prompt_lengths(pipe: Any, prompts: Sequence[str], sampler: SamplerSettings) -> None:
    """Reject prompts that the pipeline would truncate silently.

    Raises:
        CalibrationError: names the first prompt that is too long, its length and the limit.
    """
    limit = sampler.text_tokens
    for prompt in (sampler.negative_prompt, *prompts):
        tokens = len(pipe.tokenizer(prompt)["input_ids"])
        if tokens > limit:
            raise CalibrationError(
                f"prompt {prompt!r} has {tokens} tokens, the limit is {limit}: shorten it or raise "
                "--text-tokens"
            )
