"""Denoise one request with a `WanPipeline` on one device.

Over several ranks (`worker/distributed/cfg_parallel.py`) every rank runs the same pipeline with the
same noise and the same scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor

from jobs.spec import GenerationRequest
from quant import denoising_run
from worker.device import Device

Embeddings = tuple[Tensor, Tensor | None]
"""The embeddings of prompt and negative prompt, [1, L, D] each; None without guidance."""

OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done, and with the latents [1, C, F, H, W] that
the model predicts for the end; where a scheduler does not keep them, with those of the step."""


class Denoise(Protocol):
    """A function that runs all steps and returns the latents [1, C, F, H, W].

    UniPC returns them in float32, Euler's method in the type of the transformer's output.
    It calls `on_step` after each step; an exception ends it.
    """

    def __call__(
        self,
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor: ...


def _noise(pipeline: WanPipeline, request: GenerationRequest) -> dict[str, Any]:
    """Build the arguments by which the pipeline gets the noise of the request's seed.

    Of a seed torch's generator on the CPU takes the lower 32 bits only. So seeds with more bits
    draw from NumPy's legacy generator, whose numbers are fixed for good; those with fewer give what
    diffusers gives.
    """
    if request.seed < 2**32:
        return {"generator": torch.Generator("cpu").manual_seed(request.seed)}
    source = np.random.RandomState([request.seed & 0xFFFFFFFF, request.seed >> 32])
    shape = (
        1,
        pipeline.transformer.config.in_channels,
        (request.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1,
        request.height // pipeline.vae_scale_factor_spatial,
        request.width // pipeline.vae_scale_factor_spatial,
    )
    return {"latents": torch.from_numpy(source.standard_normal(shape).astype(np.float32))}


def denoise_on(device: Device) -> Denoise:
    """Build the function that denoises on `device` alone."""

    def denoise(
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor:
        def on_step_end(
            _: WanPipeline, step: int, __: Tensor, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            # A device runs asynchronously. Without waiting, progress would run ahead of it and a
            # cancel would take effect late.
            device.synchronize()
            on_step(step + 1, _predicted(pipeline.scheduler, tensors["latents"]))
            return {}

        with denoising_run(pipeline.transformer):
            latents: Tensor = pipeline(
                prompt_embeds=embeddings[0],
                negative_prompt_embeds=embeddings[1],
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                **_noise(pipeline, request),
                output_type="latent",
                callback_on_step_end=on_step_end,
            ).frames
        return latents

    return denoise


def _predicted(scheduler: Any, latents: Tensor) -> Tensor:
    """Return the finished latents as the model predicted them in this step, if they are kept.

    The solvers of several steps keep the model's last outputs. Those that are told to
    (`predict_x0`, as Wan's own), or whose algorithm works with them, keep them as predictions. Our
    own Euler keeps the latest.
    """
    predicted: Tensor | None = getattr(scheduler, "predicted", None)
    if predicted is not None:
        return predicted
    outputs = getattr(scheduler, "model_outputs", None)
    config = scheduler.config
    keeps_predictions = config.get("predict_x0") is True or str(
        config.get("algorithm_type")
    ).endswith("dpmsolver++")
    if keeps_predictions and outputs and isinstance(outputs[-1], Tensor):
        return outputs[-1]
    return latents
