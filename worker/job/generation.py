"""Turn a job's record into a stored video: run the engine, encode MP4 and pictures, store them."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from redis.exceptions import RedisError

from jobs import durations
from jobs.artifacts.store import artifact_key, spritesheet_key, thumbnail_key
from jobs.durations import Durations
from jobs.errors import ArtifactNotStored, WorkerUnfit
from jobs.record import (
    Attempt,
    JobRecord,
    Picture,
    Spritesheet,
    Stage,
    StageTimings,
    Video,
    now,
)
from worker.interface import Clip, Engine, Frame
from worker.job.context import JobContext
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.job.pictures import EncodedPictures, PictureCollector
from worker.job.progress import JobClock, JobProgress, JobThreads
from worker.job.stage_spans import stage_span, stage_spans

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Success:
    """The outcome of an attempt whose video is stored."""

    video: Video
    timings: StageTimings


def make_video(
    context: JobContext, attempt: Attempt, record: JobRecord, threads: JobThreads
) -> Success:
    """Run the engine, encode its frames and store the file; raises whatever they raise."""
    claimed = time.perf_counter()
    # Two hosts' clocks: the service wrote `created_at`, this worker `started_at`.
    queue_s = max(0.0, ((record.started_at or now()) - record.created_at).total_seconds())
    request, stats = record.request, context.stats
    clock = JobClock(request, _read_durations(context, record), stats.step_times, context.limits)
    stop_sources = (context.drain, context.job)
    with stage_spans() as spans:
        control = JobProgress(threads, clock, stop_sources, record.deadline_s, spans)
        clip = context.engine.generate(request, control, record.owner)
        stats.record_steps(request.mode, clock.step_seconds, clip.act_shares, clip.attention_shares)
        video, mp4_s = _encode_and_store(context, attempt, record, clip, control)
    timings = StageTimings(
        queue_s=queue_s,
        text_encoder_s=clip.seconds.text_encoder_s,
        denoise_s=clip.seconds.denoise_s,
        vae_s=clip.seconds.vae_s,
        mp4_s=mp4_s,
        total_s=time.perf_counter() - claimed,
    )
    return Success(video, timings)


def record_durations(context: JobContext, record: JobRecord, timings: StageTimings) -> None:
    """Add a job's durations to those of its shape; not retried, as only estimates use them."""
    steps, texts_s = record.request.num_inference_steps, timings.text_encoder_s
    rest_s = max(0.0, timings.total_s - timings.denoise_s - texts_s)
    measured = Durations(timings.denoise_s / steps, rest_s, texts_s)
    with suppress(RedisError):
        durations.measure(context.redis, record.request, measured)


def _read_durations(context: JobContext, record: JobRecord) -> Durations | None:
    with suppress(RedisError):
        return durations.read(context.redis, record.request)
    return None


def _encode_and_store(
    context: JobContext, attempt: Attempt, record: JobRecord, clip: Clip, control: JobProgress
) -> tuple[Video, float]:
    """Encode the clip, store the MP4 and its pictures; return the video and the MP4's seconds.

    Decoding and encoding overlap. The VAE's seconds are those spent decoding; the MP4's are those
    the worker waited for ffmpeg. So the two add up to the wall time of both.
    """
    request = record.request
    target = VideoFormat(request.width, request.height, clip.num_frames, context.engine.model.fps)
    collector = PictureCollector(target)
    with tempfile.TemporaryDirectory(dir=context.scratch) as folder, closing(clip.frames):
        with stage_span("encode") as span:
            encoded = encode_mp4(
                collector.watch(_report_last_frame(clip.frames, control)),
                Path(folder) / "video.mp4",
                target,
                title=f"{request.model} {request.mode} seed {request.seed}",
                metadata=video_metadata(context.engine, record),
                check=control.check,
            )
            pictures = collector.encode(Path(folder))
            span.set({"wan.vae_s": clip.seconds.vae_s, "wan.encoder_waited_s": encoded.waited_s})
        control.progress(Stage.MP4, 1, 1)
        key = artifact_key(attempt.job_id, attempt.label)
        with stage_span("upload") as span:
            span.set({"wan.bytes": encoded.bytes})
            context.artifacts.put(key, encoded.path, control.check)
            thumbnail, spritesheet = _store_pictures(context, attempt, pictures, control)
    video = Video(
        key=key,
        bytes=encoded.bytes,
        sha256=encoded.sha256,
        frames_sha256=encoded.frames_sha256,
        width=target.width,
        height=target.height,
        num_frames=target.num_frames,
        fps=target.fps,
        thumbnail=thumbnail,
        spritesheet=spritesheet,
    )
    return video, encoded.waited_s


def _store_pictures(
    context: JobContext, attempt: Attempt, pictures: EncodedPictures | None, control: JobProgress
) -> tuple[Picture, Spritesheet] | tuple[None, None]:
    """Store the pictures; Nones if there are none, or if the store takes none."""
    if pictures is None:
        return None, None
    small, sheet, layout = pictures.thumbnail, pictures.spritesheet, pictures.layout
    keys = [make(attempt.job_id, attempt.label) for make in (thumbnail_key, spritesheet_key)]
    try:
        for key, encoded in zip(keys, (small, sheet), strict=True):
            context.artifacts.put(key, encoded.path, control.check)
    except (ArtifactNotStored, WorkerUnfit):
        # The reason was logged. If one was stored, it is deleted with the job or as an orphan.
        logger.warning("the video has no pictures, because they could not be stored")
        return None, None
    thumbnail = Picture(
        key=keys[0],
        bytes=small.bytes,
        sha256=small.sha256,
        width=small.width,
        height=small.height,
    )
    spritesheet = Spritesheet(
        key=keys[1],
        bytes=sheet.bytes,
        sha256=sheet.sha256,
        width=sheet.width,
        height=sheet.height,
        columns=layout.columns,
        rows=layout.rows,
        frame_width=layout.frame_width,
        frame_height=layout.frame_height,
        frames=layout.frames,
    )
    return thumbnail, spritesheet


def _report_last_frame(frames: Generator[Frame], control: JobProgress) -> Iterator[Frame]:
    """Yield `frames`, then report that the device has finished its part of the job."""
    yield from frames
    control.progress(Stage.MP4, 0, 1)


def video_metadata(engine: Engine, record: JobRecord) -> dict[str, object]:
    """Collect the model, the mode and every setting; of the prompts only their hashes.

    Nothing differs between two jobs with the same request, so their files are the same.
    """
    request = record.request
    modes = {mode.name: mode for mode in engine.modes}
    return {
        "prompt_sha256": hashlib.sha256(request.prompt.encode()).hexdigest(),
        "negative_prompt_sha256": hashlib.sha256(request.negative_prompt.encode()).hexdigest(),
        "model": request.model,
        "model_fingerprint": engine.model.fingerprint,
        "mode": request.mode,
        "recipe_fingerprint": modes[request.mode].recipe_fingerprint,
        "variant": modes[request.mode].variant,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }
