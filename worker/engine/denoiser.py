"""The denoising of one request by a `WanPipeline`, on one card or as one of several.

Over several cards each runs the same pipeline with the same noise and the same scheduler, so all
have the same latents after each step; what a forward pass consists of is shared out beneath the
pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers import WanPipeline
from torch import Tensor

from jobs.spec import GenerationRequest
from worker.device import Device

Embeddings = tuple[Tensor, Tensor | None]
"""Of the prompt and of the negative one, [1, L, D] each; None where guidance is off."""

OnStep = Callable[[int], None]


class Denoise(Protocol):
    """Runs all steps and returns the latents [1, C, F, H, W] in float32.

    `on_step` is called after each step, and ends the denoising by raising.
    """

    def __call__(
        self,
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor: ...


def denoise_on(device: Device) -> Denoise:
    """The whole denoising on one device."""

    def denoise(
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor:
        def on_step_end(
            _: WanPipeline, step: int, __: Tensor, ___: dict[str, Any]
        ) -> dict[str, Any]:
            # A device runs behind Python: without waiting, progress would be a promise and a cancel
            # would come late.
            device.synchronize()
            on_step(step + 1)
            return {}

        latents: Tensor = pipeline(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1],
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).frames
        return latents

    return denoise
