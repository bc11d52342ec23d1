"""Run one attempt at a job and turn every error into an outcome.

The outcome is a value that the task (`worker/tasks.py`) writes once. A job that was lost (its
worker died or hung, or its device is gone) is delivered again, and so is one whose worker cannot
use its disk or ffmpeg; a job that failed is not.
"""

from __future__ import annotations

import contextvars
import logging
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from redis.exceptions import RedisError

from jobs import catalog
from jobs.errors import (
    AppError,
    GenerationCancelled,
    OutOfDeviceMemory,
    StaleAttempt,
    WorkerUnfit,
)
from jobs.record import Attempt, Failure, JobRecord
from jobs.store.live.previews import PreviewWriter
from jobs.telemetry import tracing
from worker.job.context import JobContext
from worker.job.fitness import refused_by_system
from worker.job.generation import Success, make_video
from worker.job.lease import LeaseKeeper
from worker.job.preview import PreviewThread
from worker.job.progress import JobReturned, JobThreads
from worker.job.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job was cancelled, and the device no longer works on it."""


@dataclass(frozen=True, slots=True)
class Released:
    """The worker stops at once and returns the job to the queue."""


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device is unusable in this process, whether or not the job caused that."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """The worker is at fault, and not the job; `reason` is a sentence without paths and hosts."""

    reason: str


Outcome = Success | Failure | Cancelled | Released | DeviceLost | Unfit


def run_attempt(
    context: JobContext, attempt: Attempt, record: JobRecord, lease: LeaseKeeper
) -> Outcome:
    """Make the job's video and store it.

    Raises:
        StaleAttempt: the job no longer belongs to this attempt; nothing may be written.
    """
    with (
        _watchdog(context, attempt) as watchdog,
        _previews(context, attempt) as previews,
    ):
        threads = JobThreads(lease, watchdog, previews)
        outcome = _outcome(context, attempt, record, threads)
        if isinstance(outcome, Failure) and outcome.code == OutOfDeviceMemory.code:
            # Only here have the stack frames ended that referred to the job's tensors.
            watchdog.alive()
            _empty_cache(context)
    return outcome


def _empty_cache(context: JobContext) -> None:
    try:
        context.engine.device.empty_cache()
    except Exception:
        # The job keeps its outcome. A device that cannot free memory cannot run another job.
        logger.exception("the device cannot give its memory back")
        context.stats.record_device_lost()


def _outcome(
    context: JobContext, attempt: Attempt, record: JobRecord, threads: JobThreads
) -> Outcome:
    try:
        return make_video(context, attempt, record, threads)
    except StaleAttempt:
        raise
    except JobReturned:
        return Released()
    except GenerationCancelled:
        return Cancelled()
    except WorkerUnfit as error:
        context.stats.record_fault(error.detail)
        return Unfit(error.detail)
    except AppError as error:
        logger.error("failed: %s: %s", error.code, error)
        return Failure(code=error.code, detail=error.detail)
    except Exception as error:
        # The worker's one broad clause. Whatever a model, a driver or a full disk raises, the
        # caller must get an end, the next job a worker, and the operator the traceback. What must
        # propagate (lost attempts, SystemExit) was handled above or is no Exception.
        out_of_memory = context.engine.device.is_out_of_memory(error)
        what = "out of memory" if out_of_memory else "failed with an unexpected error"
        logger.exception(what)
        return _from_unexpected(context, record, error)


def _from_unexpected(context: JobContext, record: JobRecord, error: Exception) -> Outcome:
    device = context.engine.device
    if device.is_lost(error):
        context.stats.record_device_lost()
        return DeviceLost()
    if not device.is_out_of_memory(error):
        if isinstance(error, OSError):
            # Nothing in a request reaches the operating system. What that refuses is the worker's:
            # its scratch folder, a disk that is broken, files of the model that are gone.
            unfit = refused_by_system(error)
            context.stats.record_fault(unfit.detail)
            return Unfit(unfit.detail)
        return Failure(
            code=AppError.code,
            detail="An unexpected error ended the job; the worker's log has it under the job's id.",
        )
    context.stats.record_out_of_memory()
    _clear_frames(error)
    request = record.request
    return Failure(
        code=OutOfDeviceMemory.code,
        detail=f"The device ran out of memory with {request.num_frames} frames of "
        f"{request.size}; ask for fewer frames or a smaller size.",
    )


def _clear_frames(error: BaseException) -> None:
    """Drop the local variables of all stack frames that an error and its causes passed through."""
    pending, seen = [error], set[int]()
    while pending:
        each = pending.pop()
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        # Both: an error that was raised from a second one while a third was handled has two.
        found = (each.__cause__, each.__context__)
        pending += [other for other in found if other is not None and id(other) not in seen]


def _previews(
    context: JobContext, attempt: Attempt
) -> AbstractContextManager[PreviewThread | None]:
    pace = context.engine.preview_pace
    if pace is None:
        return nullcontext()
    return PreviewThread(pace, PreviewWriter(context.redis), attempt)


def _watchdog(context: JobContext, attempt: Attempt) -> Watchdog:
    def give_up() -> None:
        with suppress(RedisError, StaleAttempt):
            state = context.store.give_up(attempt)
            logger.critical("the job was given up and is %s", state)
            # This thread has the job's span, whose own thread hangs: nobody else would send it.
            span = tracing.current_span()
            span.set({"wan.outcome": "hung"})
            span.fail("hung")
            span.end()
        with suppress(RedisError):  # also if the job is no longer this attempt's
            catalog.withdraw(context.redis, context.worker)
        tracing.stop()

    # The watchdog's thread has none of the job's context variables (its id in log lines).
    job_variables = contextvars.copy_context()
    return Watchdog(context.limits.first_step_s, lambda: job_variables.run(give_up))
