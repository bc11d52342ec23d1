"""From a job's record to a stored video: the engine's work, the MP4, and the artifact."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from redis.exceptions import RedisError

from jobs import durations
from jobs.artifacts.store import artifact_key
from jobs.durations import Durations
from jobs.record import Attempt, JobRecord, Stage, StageTimings, Video, now
from worker.interface import Clip, Engine, Frame
from worker.job.context import JobContext
from worker.job.lease import LeaseKeeper
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.job.progress import JobClock, JobProgress
from worker.job.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Success:
    """The video is stored under its key."""

    video: Video
    timings: StageTimings


@dataclass(frozen=True, slots=True)
class JobThreads:
    """The two threads beside a job."""

    lifeline: LeaseKeeper
    watchdog: Watchdog


def make_video(
    place: JobContext, attempt: Attempt, record: JobRecord, guards: JobThreads
) -> Success:
    """Run the engine, encode its frames and store the file; raises whatever any of them does."""
    claimed = time.perf_counter()
    # Two hosts' clocks: the service wrote one time, this worker the other.
    queue_s = max(0.0, ((record.started_at or now()) - record.created_at).total_seconds())
    request, journal = record.request, place.journal
    clock = JobClock(request, _measured(place, record), journal.step_times, place.limits)
    wishes = (place.drain, place.job)
    watch = JobProgress(guards.lifeline, guards.watchdog, clock, wishes, record.deadline_s)
    clip = place.engine.generate(request, watch, record.owner)
    journal.measured(request.mode, clock.own_steps, clip.act_shares)
    video, mp4_s = _encode_and_store(place, attempt, record, clip, watch)
    timings = StageTimings(
        queue_s=queue_s,
        text_encoder_s=clip.seconds.text_encoder_s,
        denoise_s=clip.seconds.denoise_s,
        vae_s=clip.seconds.vae_s,
        mp4_s=mp4_s,
        total_s=time.perf_counter() - claimed,
    )
    return Success(video, timings)


def remember_pace(place: JobContext, record: JobRecord, timings: StageTimings) -> None:
    """Add what a job took to what is known of its shape; an estimate is not worth a wait."""
    steps, texts_s = record.request.num_inference_steps, timings.text_encoder_s
    rest_s = max(0.0, timings.total_s - timings.denoise_s - texts_s)
    took = Durations(timings.denoise_s / steps, rest_s, texts_s)
    with suppress(RedisError):
        durations.measure(place.redis, record.request, took)


def _measured(place: JobContext, record: JobRecord) -> Durations | None:
    with suppress(RedisError):
        return durations.read(place.redis, record.request)
    return None


def _encode_and_store(
    place: JobContext, attempt: Attempt, record: JobRecord, clip: Clip, watch: JobProgress
) -> tuple[Video, float]:
    """Encode the clip into an MP4, store it, and say how many seconds the MP4 cost.

    Decoding and encoding overlap. The VAE's seconds are those spent decoding; the MP4's are those
    ffmpeg held the worker up, so the two add up to the wall time of both.
    """
    request = record.request
    target = VideoFormat(request.width, request.height, clip.num_frames, place.engine.model.fps)
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder, closing(clip.frames):
        encoded = encode_mp4(
            _reporting_the_end(clip.frames, watch),
            Path(folder) / "video.mp4",
            target,
            title=f"{request.model} {request.mode} seed {request.seed}",
            facts=video_facts(place.engine, record),
            check=watch.check,
        )
        watch.progress(Stage.MP4, 1, 1)
        key = artifact_key(attempt.job_id, attempt.label)
        place.artifacts.put(key, encoded.path, watch.check)
    video = Video(
        key=key,
        bytes=encoded.bytes,
        sha256=encoded.sha256,
        width=target.width,
        height=target.height,
        num_frames=target.num_frames,
        fps=target.fps,
    )
    return video, encoded.waited_s


def _reporting_the_end(frames: Generator[Frame], watch: JobProgress) -> Iterator[Frame]:
    """Once the last frame is taken, the device has nothing more to do with the job."""
    yield from frames
    watch.progress(Stage.MP4, 0, 1)


def video_facts(engine: Engine, record: JobRecord) -> dict[str, object]:
    """Name the job, the model, the mode and every setting; of the prompts only the hashes."""
    request = record.request
    modes = {mode.name: mode for mode in engine.modes}
    return {
        "job_id": record.id,
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
