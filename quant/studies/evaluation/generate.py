"""Generate the videos of all candidates, one by one, each kept on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.sampling import run_prompts
from quant.studies.evaluation.video_files import Frames, Video
from quant.studies.host import usable_cores
from quant.studies.output.study_folder import StudyFolder
from quant.studies.progress import StudyProgress
from quant.transformer.attention.steps import denoising_run

_WRITERS = 8
"""Videos of a batch that are encoded at the same time, at most: each by one thread of another
process, and no more than there are cores."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which videos there are to be.

    Attributes:
        draws: how many videos of each prompt, each with noise of its own.
        batch: how many videos are denoised together.
    """

    prompts: PromptSet
    sampler: SamplerSettings
    draws: int
    batch: int = 1

    @property
    def videos(self) -> int:
        """Return how many videos each candidate makes."""
        return len(self.prompts.prompts) * self.draws

    @property
    def passes(self) -> int:
        """Return how many passes of the transformer one video takes."""
        branches = 2 if self.sampler.guidance_scale > 1 else 1
        return self.sampler.num_inference_steps * branches

    def of_candidate(self, folder: Path, name: str) -> list[Video]:
        """Return a candidate's videos, prompt by prompt; the same seeds for every candidate."""
        count = len(self.prompts.prompts)
        return [
            Video(
                text,
                self.sampler.seed + draw * count + number,
                folder / "videos" / name / f"{number:05d}-{draw}",
            )
            for number, text in enumerate(self.prompts.prompts)
            for draw in range(self.draws)
        ]


def video_unit(name: str, video: Video) -> str:
    """Return the name of the unit of work that makes a video."""
    return f"video/{name}/{video.stem.name}"


def generate_videos(
    pipe: Any,
    plan: Plan,
    builders: Mapping[str, Callable[[Any], Any]],
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Make the videos that the folder lacks.

    Args:
        pipe: a `WanPipeline` in BF16; its VAE decodes in float32, as a worker's does.
        builders: by candidate, what turns the BF16 transformer into the one that is evaluated.

    Raises:
        StudyError: latents are not finite, or the disk is full.
        QuantError: a transformer cannot be built.
    """
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.float()
    source = pipe.transformer
    try:
        for name, build in builders.items():
            videos = plan.of_candidate(folder.path, name)
            batches = [videos[n : n + plan.batch] for n in range(0, len(videos), plan.batch)]
            missing = [
                each for each in batches if not all(_is_kept(folder, name, video) for video in each)
            ]
            progress.skip(plan.passes * (len(videos) - sum(map(len, missing))))
            if missing:
                pipe.transformer = build(source)
            for batch in missing:
                last = videos.index(batch[-1]) + 1
                progress.describe(f"{name}, video {last} of {len(videos)}")
                latents = _latents(pipe, plan, batch, progress)
                made = zip(batch, torch.split(latents, 1), decoded(pipe.vae, latents), strict=True)
                _keep([each for each in made if not _is_kept(folder, name, each[0])], name, folder)
            pipe.transformer = source
    finally:
        pipe.transformer = source


def _is_kept(folder: StudyFolder, name: str, video: Video) -> bool:
    return folder.unit(video_unit(name, video)) is not None


def _keep(made: Sequence[tuple[Video, Tensor, Frames]], name: str, folder: StudyFolder) -> None:
    """Write videos, several at the same time, and keep a unit for each."""
    with ThreadPoolExecutor(min(_WRITERS, usable_cores()), "video") as pool:
        written = pool.map(lambda each: Video.write(*each), made)
        for (video, _, _), _ in zip(made, written, strict=True):
            folder.keep(video_unit(name, video), {"sha256": video.digest()})


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> list[Frames]:
    """Decode normalized latents [B, C, F, H, W]: B times [F, H, W, 3] in 8 bits.

    One is decoded at a time: what that takes would else grow with the batch.
    """
    shape = (1, latents.shape[1], 1, 1, 1)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=torch.float32).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    found = []
    for each in torch.split(latents.float() * std + mean, 1):
        video = vae.decode(each).sample[0].float()
        pixels = (video.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 3, 0) * 255
        found.append(pixels.round().cpu().numpy().astype(np.uint8))
    return found


def _latents(pipe: Any, plan: Plan, videos: Sequence[Video], progress: StudyProgress) -> Tensor:
    """Denoise videos together; a batch that was kept in part runs again as a whole."""
    each = plan.passes // plan.sampler.num_inference_steps * len(videos)
    with denoising_run(pipe.transformer):
        return run_prompts(
            pipe,
            [video.prompt for video in videos],
            [video.seed for video in videos],
            plan.sampler,
            lambda _step: progress.advance(each),
        )
