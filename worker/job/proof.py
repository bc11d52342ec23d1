"""Prove that a worker can make videos: run one tiny job through every stage and every mode.

Much shows only when a job runs: parts that do not belong together, a broken ffmpeg, a full disk,
numbers that are not finite. So nothing is offered before a job has gone through text encoder,
transformer, scheduler, VAE and ffmpeg. All modes share the VAE, so only the first mode's latents
are decoded. ffmpeg makes and reads its video while the other modes denoise.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import imageio_ffmpeg

from jobs.errors import GenerationFailed
from jobs.record import Stage
from worker.errors import ProofFailed
from worker.interface import Engine, Frame, PreviewClip, StageSeconds
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.process.scratch import scratch_folder

logger = logging.getLogger(__name__)

_PARTS: Final = {
    Stage.TEXT_ENCODER: "the text encoder",
    Stage.DENOISE: "denoising",
    Stage.VAE: "the VAE",
    Stage.MP4: "encoding the MP4",
}

_REMEDIES: Final = {
    Stage.TEXT_ENCODER: "see that the folders tokenizer and text_encoder are those of this model, "
    "and that default_negative_prompt fits text_tokens in the worker's configuration",
    Stage.DENOISE: "see that transformer and scheduler are those of this model, and that the "
    "scales or the packed checkpoint of the mode were made for it, or leave the mode out",
    Stage.VAE: "see that the folder vae is that of this model, and copy it again",
    Stage.MP4: "install the package imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE to an ffmpeg "
    "with libx264, and see that TMPDIR names a folder with free space",
}


class _Place:
    """The control of a tiny job: it knows the stage, and never stops the job."""

    def __init__(self) -> None:
        self.stage = Stage.TEXT_ENCODER

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Remember the stage."""
        self.stage = stage

    def check(self) -> None:
        """Do nothing; nobody can cancel this job."""

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None:
        """Do nothing; nobody watches this job."""


def prove(engine: Engine) -> None:
    """Run the tiny jobs with a scratch folder as jobs have it.

    Raises:
        ProofFailed: names the part that failed and the remedy.
        Exception: the device is lost to this process, as `EngineDevice.is_lost` says.
    """
    started = time.perf_counter()
    try:
        with scratch_folder() as scratch:
            prove_in(engine, scratch)
    except OSError as error:  # of the folder itself; the others have become ProofFailed
        raise ProofFailed(
            f"This worker cannot make videos, because it has no scratch folder ({error}): set "
            "TMPDIR to a folder that it may write to and that has free space."
        ) from error
    logger.info(
        "a tiny job has gone through every stage and mode in %.1f s", time.perf_counter() - started
    )


def prove_in(engine: Engine, scratch: Path) -> None:
    """Run a tiny job in each mode, the first one up to an MP4 in the folder `scratch`.

    Raises:
        ProofFailed, Exception: as for `prove`.
    """
    with ThreadPoolExecutor(1, "proof") as executor:
        video: Future[None] | None = None
        for mode in engine.modes:
            with _blaming(engine, mode.name) as place:
                request, clip = engine.tiny_job(mode.name, place)
                with closing(clip.frames):
                    if video is None:
                        frames = list(clip.frames)
                        form = VideoFormat(
                            request.width, request.height, clip.num_frames, engine.model.fps
                        )
                        video = executor.submit(_make_video, frames, form, scratch)
        if video is not None:
            with _blaming(engine, engine.modes[0].name) as place:
                place.stage = Stage.MP4
                video.result()


def prove_mode(engine: Engine, mode: str, scratch: Path | None) -> StageSeconds:
    """Run a tiny job in a mode, up to an MP4 in the folder `scratch` if there is one.

    Raises:
        ProofFailed, Exception: as for `prove`.
    """
    with _blaming(engine, mode) as place:
        request, clip = engine.tiny_job(mode, place)
        with closing(clip.frames):
            if scratch is not None:
                frames = list(clip.frames)  # first, so that a failure is the VAE's or ffmpeg's
                place.stage = Stage.MP4
                form = VideoFormat(request.width, request.height, clip.num_frames, engine.model.fps)
                _make_video(frames, form, scratch)
    return clip.seconds


@contextmanager
def _blaming(engine: Engine, mode: str) -> Iterator[_Place]:
    """Name the part that failed in the block, and its remedy."""
    place = _Place()
    try:
        yield place
    except Exception as error:
        if engine.device.is_lost(error):
            raise
        raise ProofFailed(
            f"This worker cannot make videos, because {_PARTS[place.stage]} failed in a tiny "
            f"job in mode {mode!r} ({_reason(error)}): {_REMEDIES[place.stage]}."
        ) from error


def _make_video(frames: list[Frame], form: VideoFormat, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        video = encode_mp4(frames, Path(folder) / "proof.mp4", form, "proof", {}, lambda: None)
        count, _ = imageio_ffmpeg.count_frames_and_secs(video.path)
    if count != form.num_frames:
        raise GenerationFailed(f"The MP4 of {form.num_frames} frames has {count} frames.")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, GenerationFailed) else f"{type(error).__name__}: {text[:300]}"
