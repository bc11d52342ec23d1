"""Run Wan2.1 text-to-video, loaded on one device in one or more modes.

The text encoder, the VAE and the scheduler's configuration exist once. Each mode has its own
transformer, which shares tensors with the others where possible, and its own `WanPipeline` around
it. The pipeline only denoises. Encoding the prompt (`worker/engine/prompt_encoder.py`) and decoding
the latents are separate calls, so that each stage is timed, reports progress and can be stopped.

On one device the same request gives the same frames: the noise is drawn from the seed, on the CPU
whatever the device, and each run has its own scheduler. The engine uses no queue, no files and no
Redis.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

import quant
from jobs.catalog import ModelOffer, ModeOffer
from jobs.errors import GenerationFailed
from jobs.geometry import is_frame_count, parse_size
from jobs.record import Stage
from jobs.spec import GenerationRequest
from worker.config import ModelConfig
from worker.device import Device
from worker.engine.checks import check_before_each, check_output, require_finite
from worker.engine.denoiser import Denoise, denoise_on
from worker.engine.prompt_encoder import PromptEncoder
from worker.engine.saturation import ActSample
from worker.engine.step_cache import step_cache
from worker.engine.vae_decoder import (
    decode_chunks,
    decode_tiled,
    denormalize,
    stop_points,
    to_frames,
)
from worker.interface import AttentionShares, Clip, Frame, JobControl, PreviewPace, StageSeconds
from worker.model_loader.components import Components
from worker.model_loader.loader import Mode
from worker.model_loader.scheduler import (
    mode_scheduler,
    scheduler_for_run,
    scheduler_name,
    shift_for,
)

logger = logging.getLogger(__name__)

TINY_FRAMES: Final = 5
"""Two latent frames: the second one goes through the VAE's layers for time as well."""

TINY_SIZE: Final = "96x32"
"""The size of the tiny job on one accelerator: 24 tokens in two latent frames, as few as kernels
are tried with (`quant/kernels/self_test.py`)."""

TINY_SIZE_ON_CPU: Final = "48x32"
"""The size on a CPU, where plain torch takes any number of tokens. Most of a tiny job's time there
is the VAE's, which grows with the pixels."""

TINY_PROMPT: Final = "a"


class WanEngine:
    """The engine of one worker: one model on one device in its modes. It runs one job at a time.

    Attributes:
        loaded: the modes by name, in the order of the configuration.
        tokenizer_text: the `tokenizer.json` whose fingerprint is `model.tokenizer`.
    """

    def __init__(
        self,
        config: ModelConfig,
        fingerprint: str,
        device: Device,
        components: Components,
        modes: tuple[Mode, ...],
        denoise: Denoise | None = None,
    ) -> None:
        """Build the pipelines.

        Args:
            denoise: the function that denoises; by default on `device` alone.
        """
        self.config = config
        self.device = device
        self.components = components
        self._is_alone = denoise is None
        self._denoise = denoise or denoise_on(device)
        self.loaded = {mode.offer.name: mode for mode in modes}
        self._pipelines = {name: _pipeline(components, mode) for name, mode in self.loaded.items()}
        self.prompts = PromptEncoder(components, device, config)
        self.tokenizer_text = components.tokenizer.text
        self.model: ModelOffer = config.offer(fingerprint, components.tokenizer.fingerprint)
        self.modes: tuple[ModeOffer, ...] = tuple(mode.offer for mode in modes)

    @property
    def preview_pace(self) -> PreviewPace | None:
        """How often it makes previews; None without a preview map, or if they are off."""
        return None if self.components.preview is None else self.components.preview.pace

    def describe(self) -> list[str]:
        """List for the start log what was loaded and converted, and how many bytes it takes."""
        lines = [
            f"model: {self.model.name} ({self.model.fingerprint})",
            f"device: {self.device.name}",
            f"modes: {', '.join(mode.name for mode in self.modes)}",
            f"prompts: at most {self.config.text_tokens} tokens, counted "
            f"with tokenizer {self.model.tokenizer}",
        ]
        for name, mode in self.loaded.items():
            if mode.conversion is not None:
                lines.append(f"mode {name}: {mode.conversion}")
            if mode.step_cache is not None:
                cache = mode.step_cache
                lines.append(f"mode {name}: steps cached ({cache.method}, {cache.threshold:g})")
            if mode.offer.own or mode.scheduler or mode.flow_shift:
                lines.append(f"mode {name}: {self._sampling(mode)}")
            attention = quant.attention_steps_of(mode.transformer)
            if attention is not None:
                lines.append(f"mode {name}: {attention}")
            lines.append(f"mode {name}: {_bytes(mode.weight_bytes)} of transformer weights")
            lines.append(f"mode {name}: runs on {mode.offer.kernels or 'diffusers'} kernels")
        together = quant.weight_bytes(*(mode.transformer for mode in self.loaded.values()))
        lines.append(f"all modes together: {_bytes(together)}, as they share what is the same")
        rest = quant.weight_bytes(self.components.text_encoder, self.components.vae)
        lines.append(f"text encoder and VAE: {_bytes(rest)}")
        memory = self.device.memory()
        if memory is not None:
            lines.append(
                f"device memory: {_bytes(memory.allocated_bytes)} in use, "
                f"{_bytes(memory.peak_bytes)} at most, of {_bytes(memory.total_bytes)}"
            )
        return lines

    def _sampling(self, mode: Mode) -> str:
        """Say by what bounds, scheduler and shift a mode differs from the model."""
        terms = self.model.terms(mode.offer)
        parts = [
            f"{terms.default_steps} steps ({terms.min_steps} to {terms.max_steps})",
            f"guidance {terms.default_guidance_scale:g} (at most {terms.max_guidance_scale:g})",
            f"scheduler {mode.scheduler or scheduler_name(self.components.scheduler)}",
        ]
        if mode.flow_shift is not None:
            parts.append(f"flow shift {mode.flow_shift}")
        return ", ".join(parts)

    def generate(self, request: GenerationRequest, control: JobControl, owner: str) -> Clip:
        """Encode the prompt and denoise; frames are decoded as the caller consumes them.

        The clip's seconds are wall time, with the device synchronized at the end of each stage.
        `vae_s` counts only the decoding, not what the caller does between two frames.
        """
        self._refuse_unservable(request)
        return self._run(request, control, owner)

    def tiny_job(self, mode: str, control: JobControl) -> tuple[GenerationRequest, Clip]:
        """Run a mode in one step: on one device with one small forward pass.

        Several ranks run two passes of the smallest size, whose tokens they are known to share.
        """
        config = self.config
        tiny = TINY_SIZE_ON_CPU if self.device.kind == "cpu" else TINY_SIZE
        terms = self.model.terms(self.loaded[mode].offer)
        smallest = min(config.sizes, key=lambda size: math.prod(parse_size(size)))
        request = GenerationRequest(
            prompt=TINY_PROMPT,
            negative_prompt=config.default_negative_prompt,
            mode=mode,
            size=tiny if self._is_alone else smallest,
            num_frames=min(TINY_FRAMES, config.max_frames),
            num_inference_steps=1,
            guidance_scale=1.0 if self._is_alone else terms.default_guidance_scale,
            seed=0,
            model=config.name,
        )
        self.prompts.refuse_too_long(request)
        return request, self._run(request, control, owner="")

    def _run(self, request: GenerationRequest, control: JobControl, owner: str) -> Clip:
        pipeline, mode = self._pipelines[request.mode], self.loaded[request.mode]
        pipeline.scheduler = scheduler_for_run(
            mode_scheduler(self.components.scheduler, mode.scheduler),
            shift_for(request.size, mode.flow_shift, self.config.flow_shift),
        )
        seconds = StageSeconds()
        with self._timed(seconds, "text_encoder_s"):
            embeddings = self.prompts.encode(request, control, owner)
        sample = ActSample(pipeline.transformer)

        steps, preview = request.num_inference_steps, self.components.preview

        def tell(done: int) -> None:
            control.progress(Stage.DENOISE, done, steps)
            if done == steps // 2:
                sample.arm()

        def on_step(done: int, predicted: Tensor) -> None:
            tell(done)
            if preview is not None:
                control.preview(done, steps, partial(preview.clip, predicted))

        tell(0)
        try:
            with (
                self._timed(seconds, "denoise_s"),
                step_cache(pipeline.transformer, mode.step_cache, steps),
            ):
                latents = self._denoise(pipeline, request, embeddings, on_step)
                require_finite(
                    latents,
                    f"Denoising in mode {request.mode}",
                    "Try another mode or another seed; if all of them fail, the model's files or "
                    "its scales are damaged.",
                )
        finally:
            sample.disarm()
            pipeline.scheduler = self.components.scheduler  # the scheduler of the run holds latents
        frames = self._frames(latents, seconds, control)
        return Clip(
            frames,
            request.num_frames,
            seconds,
            sample.shares(),
            _attention_shares(pipeline.transformer),
        )

    def _refuse_unservable(self, request: GenerationRequest) -> None:
        """Refuse what the pipeline would round or truncate; a job may be older than this worker."""
        if request.mode not in self.loaded or request.size not in self.config.sizes:
            raise GenerationFailed(
                f"This worker serves modes {', '.join(self.loaded)} at sizes "
                f"{', '.join(self.config.sizes)}, not {request.mode} at {request.size}."
            )
        if not is_frame_count(request.num_frames) or request.num_frames > self.config.max_frames:
            raise GenerationFailed(
                f"num_frames is {request.num_frames}, not 4k+1 up to {self.config.max_frames}."
            )
        terms = self.model.terms(self.loaded[request.mode].offer)
        if request.guidance_scale > terms.max_guidance_scale or not (
            terms.min_steps <= request.num_inference_steps <= terms.max_steps
        ):
            raise GenerationFailed(
                f"Mode {request.mode} takes {terms.min_steps} to {terms.max_steps} steps and at "
                f"most guidance {terms.max_guidance_scale:g}, not {request.num_inference_steps} "
                f"steps with guidance {request.guidance_scale:g}."
            )
        self.prompts.refuse_too_long(request)

    def _frames(
        self, latents: Tensor, seconds: StageSeconds, control: JobControl
    ) -> Generator[Frame]:
        """Decode one latent frame after another; only the time inside the VAE counts."""
        vae = self.components.vae
        total = latents.shape[2]
        control.progress(Stage.VAE, 0, total)
        latents = denormalize(vae, latents.to(self.device.vae_dtype))
        decode = decode_tiled if self.components.vae_tiling else decode_chunks
        # The decoder's own output: what follows it clamps infinite values to black and white.
        finite = check_output(
            vae.decoder,
            "The VAE",
            "Try another seed; if it does so for other jobs, too, the model's files are damaged.",
        )
        with check_before_each(stop_points(vae), control.check), finite:
            chunks = decode(vae, latents)
            for done in range(1, total + 1):
                with self._timed(seconds, "vae_s"):
                    frames = to_frames(next(chunks))
                control.progress(Stage.VAE, done, total)
                yield from frames

    @contextmanager
    def _timed(self, seconds: StageSeconds, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.device.synchronize()
        setattr(seconds, name, getattr(seconds, name) + time.perf_counter() - started)


def _pipeline(components: Components, mode: Mode) -> WanPipeline:
    pipeline = WanPipeline(
        tokenizer=None,  # the pipeline gets embeddings
        text_encoder=None,
        vae=components.vae,
        scheduler=components.scheduler,
        transformer=mode.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _attention_shares(transformer: WanTransformer3DModel) -> AttentionShares | None:
    """Return what sparse attention kept in the last job, if a step of it was sparse."""
    sparse = quant.sparse_attention_of(transformer)
    kept = None if sparse is None else sparse.shares()
    return None if kept is None else AttentionShares(kept.density, kept.mass)


def _bytes(count: int) -> str:
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count:,} bytes ({count / size:.1f} {unit})"
