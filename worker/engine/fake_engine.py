"""Stand in for a model: an engine that makes frames of one colour, for tests and benchmarks.

It implements the same interface as the real engine and needs neither weights nor torch. How long a
step takes is up to the caller's `on_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import numpy as np

from jobs.catalog import ModelOffer, ModeOffer
from jobs.errors import GenerationFailed
from jobs.record import Stage
from jobs.spec import GenerationRequest
from worker.interface import (
    Clip,
    DeviceMemory,
    EngineDevice,
    Frame,
    JobControl,
    PreviewClip,
    PreviewPace,
    StageSeconds,
)

OnStep = Callable[[int], None]

FAILING = "fail, please"
"""A job whose prompt contains this text fails."""


class FakeDevice:
    """The host as a device: out of memory on MemoryError, and never lost."""

    name = "none"

    def memory(self) -> DeviceMemory | None:
        return None

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def is_lost(self, error: BaseException) -> bool:
        return False

    def empty_cache(self) -> None:
        """Do nothing; there is no cache."""


class FakeEngine:
    """An engine whose frames have one colour, taken from the seed.

    `on_step` is called at each step and may wait or raise. `owners` lists the owners of all jobs.
    With a `preview_pace` it makes previews, which get brighter with each step.
    """

    device: EngineDevice = FakeDevice()
    tokenizer_text = None
    model = ModelOffer(
        name="fake",
        fingerprint="none",
        sizes=("64x32",),
        default_size="64x32",
        min_frames=1,
        max_frames=9,
        default_frames=9,
        fps=8,
        max_steps=1000,
        default_steps=4,
        default_guidance_scale=1.0,
        default_mode="plain",
        max_prompt_chars=100,
    )
    modes: tuple[ModeOffer, ...] = (
        ModeOffer(name="plain", description="One colour.", recipe_fingerprint="recipe-1"),
    )

    def __init__(
        self, on_step: OnStep = lambda step: None, preview_pace: PreviewPace | None = None
    ) -> None:
        self._on_step = on_step
        self.preview_pace = preview_pace
        self.owners: list[str] = []

    def generate(self, request: GenerationRequest, control: JobControl, owner: str) -> Clip:
        self.owners.append(owner)
        if FAILING in request.prompt:
            raise GenerationFailed("The prompt asks for a failure.")
        control.progress(Stage.TEXT_ENCODER, 1, 1)
        control.progress(Stage.DENOISE, 0, request.num_inference_steps)
        for step in range(1, request.num_inference_steps + 1):
            self._on_step(step)
            control.progress(Stage.DENOISE, step, request.num_inference_steps)
            if self.preview_pace is not None:
                make = partial(self._preview, request, step)
                control.preview(step, request.num_inference_steps, make)
        seconds = StageSeconds(text_encoder_s=0.5, denoise_s=1.5, vae_s=0.25)
        return Clip(self._frames(request, control), request.num_frames, seconds)

    def tiny_job(self, mode: str, control: JobControl) -> tuple[GenerationRequest, Clip]:
        """Make one frame, without the steps that `on_step` may delay."""
        request = GenerationRequest(
            prompt="a",
            negative_prompt="",
            mode=mode,
            size=self.model.default_size,
            num_frames=1,
            num_inference_steps=1,
            guidance_scale=self.model.default_guidance_scale,
            seed=0,
            model=self.model.name,
        )
        return request, Clip(self._frames(request, control), request.num_frames)

    def _preview(self, request: GenerationRequest, step: int) -> PreviewClip:
        shape = (max(1, request.num_frames // 4), request.height // 8, request.width // 8, 3)
        brightness = 255 * step // request.num_inference_steps
        return PreviewClip(np.full(shape, brightness, np.uint8), self.model.fps / 4)

    def _frames(self, request: GenerationRequest, control: JobControl) -> Generator[Frame]:
        for index in range(request.num_frames):
            control.progress(Stage.VAE, index + 1, request.num_frames)
            yield np.full((request.height, request.width, 3), request.seed % 256, np.uint8)
