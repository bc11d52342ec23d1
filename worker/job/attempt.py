"""One attempt at a job: a stored video, or the reason why there is none.

The outcome is a value, written once by the task (`worker/tasks.py`). What was lost (a worker that
died or hung, a device that is gone) is delivered again, what failed never.
"""

from __future__ import annotations

import contextvars
import logging
import traceback
from contextlib import suppress
from dataclasses import dataclass

from redis.exceptions import RedisError

from jobs import catalog
from jobs.errors import AppError, GenerationCancelled, OutOfDeviceMemory, StaleAttempt
from jobs.record import Attempt, Failure, JobRecord
from worker.job.context import JobContext
from worker.job.generation import JobThreads, Success, make_video
from worker.job.lease import LeaseKeeper
from worker.job.progress import GivenBack
from worker.job.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The device has stopped working on the job."""


@dataclass(frozen=True, slots=True)
class Released:
    """The worker is to stop at once; the job is another's."""


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device does nothing more for this process, whatever the job's part in that was."""


Outcome = Success | Failure | Cancelled | Released | DeviceLost


def run_attempt(
    place: JobContext, attempt: Attempt, record: JobRecord, lifeline: LeaseKeeper
) -> Outcome:
    """Make the job's video and store it.

    Raises:
        StaleAttempt: the job is no longer this attempt's; nothing is to be written.
    """
    with _watchdog(place, attempt) as watchdog:
        outcome = _outcome(place, attempt, record, JobThreads(lifeline, watchdog))
        if isinstance(outcome, Failure) and outcome.code == OutOfDeviceMemory.code:
            # Only here are the frames gone that held the job's tensors.
            watchdog.alive()
            _empty_cache(place)
    return outcome


def _empty_cache(place: JobContext) -> None:
    try:
        place.engine.device.empty_cache()
    except Exception:
        # The job has its failure, and is owed it. A device that cannot do this can do nothing.
        logger.exception("the device cannot give its memory back")
        place.journal.device_lost()


def _outcome(place: JobContext, attempt: Attempt, record: JobRecord, guards: JobThreads) -> Outcome:
    try:
        return make_video(place, attempt, record, guards)
    except StaleAttempt:
        raise
    except GivenBack:
        return Released()
    except GenerationCancelled:
        return Cancelled()
    except AppError as error:
        logger.error("failed: %s: %s", error.code, error)
        return Failure(code=error.code, detail=error.detail)
    except Exception as error:
        # The one broad clause of the worker. Whatever a model, a driver or a full disk throws, the
        # caller is owed an end and the next job a worker; the operator gets the traceback. What
        # must pass (lost attempts, SystemExit) was handled above or is no Exception.
        full = place.engine.device.is_out_of_memory(error)
        what = "out of memory" if full else "failed with an unexpected error"
        logger.exception(what)
        return _of_unexpected(place, record, error)


def _of_unexpected(place: JobContext, record: JobRecord, error: Exception) -> Outcome:
    device = place.engine.device
    if device.is_lost(error):
        place.journal.device_lost()
        return DeviceLost()
    if not device.is_out_of_memory(error):
        return Failure(
            code=AppError.code,
            detail="An unexpected error ended the job; the worker's log has it under the job's id.",
        )
    place.journal.out_of_memory()
    _forget_frames(error)
    request = record.request
    return Failure(
        code=OutOfDeviceMemory.code,
        detail=f"The device ran out of memory with {request.num_frames} frames of "
        f"{request.size}; ask for fewer frames or a smaller size.",
    )


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames refer to through which an error, and its causes, came."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _watchdog(place: JobContext, attempt: Attempt) -> Watchdog:
    def last_words() -> None:
        with suppress(RedisError, StaleAttempt):
            state = place.store.give_up(attempt)
            logger.critical("the job was given up and is %s", state)
            catalog.withdraw(place.redis, place.worker)

    in_this_job = contextvars.copy_context()
    return Watchdog(place.limits.first_step_s, lambda: in_this_job.run(last_words))
