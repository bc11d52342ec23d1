"""One attempt at a job: from its record to a stored video, or to the reason why there is none.

The outcome is a value, written once by the task (`worker/tasks.py`). RQ's job is only the delivery:
it ends well whenever the record has an outcome, so RQ retries exactly what was lost (its worker
died, Redis was away) and never what failed.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from redis.exceptions import RedisError
from rq.timeouts import JobTimeoutException

from jobs.artifacts import ArtifactStore, artifact_key
from jobs.errors import (
    AppError,
    ArtifactsUnavailable,
    GenerationCancelled,
    GenerationTimedOut,
    OutOfDeviceMemory,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, JobRecord, Stage, StageTimings, Video, now
from jobs.store import JobStore
from worker.engine import Clip, Engine
from worker.video import VideoFormat, encode_mp4
from worker.watch import JobWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workplace:
    """What a job needs besides its id. `stop` is set by RQ's stop command."""

    worker: str
    engine: Engine
    store: JobStore
    artifacts: ArtifactStore
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class Success:
    """The video is stored under its key."""

    video: Video
    timings: StageTimings


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The device has stopped working on the job."""


Outcome = Success | Failure | Cancelled


def run_attempt(place: Workplace, attempt: Attempt) -> Outcome:
    """Make the job's video and store it.

    Raises:
        StaleAttempt: the job is no longer this attempt's; nothing is to be written.
        RedisError: the record cannot be reached; RQ will deliver the job again.
    """
    try:
        return _make_video(place, attempt)
    except (StaleAttempt, RedisError):
        raise
    except GenerationCancelled:
        return Cancelled()
    except JobTimeoutException as error:
        # RQ raises it wherever the job is at the time limit; it must become the job's failure, not
        # an internal error.
        logger.error("stopped at the time limit: %s", error)
        timed_out = GenerationTimedOut("The job ran into its time limit and was stopped.")
        return _failure(timed_out)
    except AppError as error:
        logger.error("failed: %s: %s", error.code, error)
        return _failure(error)
    except torch.OutOfMemoryError as error:
        logger.error("out of device memory: %s", error)
        return _failure(
            OutOfDeviceMemory(
                "The device ran out of memory; ask for a smaller size or fewer frames."
            )
        )
    except Exception:
        # The one broad clause of the worker. Whatever a model, a driver or a full disk throws, the
        # caller is owed an end and the next job a worker; the operator gets the traceback. What
        # must pass (RQ's timeout, lost attempts, Redis, SystemExit) was handled above or is no
        # Exception.
        logger.exception("failed with an unexpected error")
        return Failure(
            code=AppError.code,
            detail="An unexpected error ended the job; the worker's log has it under the job's id.",
        )


def record_success(place: Workplace, attempt: Attempt, success: Success) -> None:
    """End the job with its video.

    Raises:
        StaleAttempt: the job ended, or went to another attempt, while the video was being stored.
            The video is deleted: no record names it, so nothing else ever would.
        RedisError: nobody knows whether the record was written, so the video stays.
    """
    try:
        place.store.succeed(attempt, success.video, success.timings)
    except StaleAttempt:
        with suppress(ArtifactsUnavailable):  # then the service's housekeeping finds it
            place.artifacts.delete(success.video.key)
        raise


def _make_video(place: Workplace, attempt: Attempt) -> Success:
    claimed = time.perf_counter()
    record = place.store.get(attempt.job_id)
    # Two hosts' clocks: the service wrote one time, this worker the other.
    queue_s = max(0.0, ((record.started_at or now()) - record.created_at).total_seconds())
    watch = JobWatch(place.store, attempt, place.stop)
    clip = place.engine.generate(record.request, watch)
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


def _encode_and_store(
    place: Workplace, attempt: Attempt, record: JobRecord, clip: Clip, watch: JobWatch
) -> tuple[Video, float]:
    """Encode the clip into an MP4, store it, and say how many seconds the MP4 cost.

    Decoding and encoding overlap. The VAE's seconds are those spent decoding; the MP4's are those
    ffmpeg held the worker up, so the two add up to the wall time of both.
    """
    request = record.request
    target = VideoFormat(request.width, request.height, clip.num_frames, place.engine.model.fps)
    with tempfile.TemporaryDirectory(prefix="wan-worker-") as folder, closing(clip.frames):
        encoded = encode_mp4(
            clip.frames,
            Path(folder) / "video.mp4",
            target,
            title=f"{request.model} {request.mode} seed {request.seed}",
            facts=_facts(place.engine, record),
        )
        watch.progress(Stage.MP4, 1, 1)
        key = artifact_key(attempt.job_id, attempt.number)
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


def _facts(engine: Engine, record: JobRecord) -> dict[str, object]:
    """What made the video, for its metadata: whoever knows the prompt can make it again."""
    request = record.request
    recipes = {mode.name: mode.recipe_fingerprint for mode in engine.modes}
    return {
        "job_id": record.id,
        "prompt_sha256": hashlib.sha256(request.prompt.encode()).hexdigest(),
        "negative_prompt_sha256": hashlib.sha256(request.negative_prompt.encode()).hexdigest(),
        "model": request.model,
        "model_fingerprint": engine.model.fingerprint,
        "mode": request.mode,
        "recipe_fingerprint": recipes[request.mode],
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }


def _failure(error: AppError) -> Failure:
    return Failure(code=error.code, detail=error.detail)
