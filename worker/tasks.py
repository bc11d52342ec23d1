"""The only function RQ calls, by name, with a job's id and nothing else.

Where is the engine? `ResidentWorker.execute_job` sets `JOB_CONTEXT` for the length of one job, in
the same thread. A context variable rather than a module global: outside a job there is none, and
two workers in one process (tests) do not see each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Final, TypeVar

from jobs.errors import (
    ArtifactsUnavailable,
    JobAlreadyFinished,
    JobHeld,
    JobNotFound,
    RecordUnreadable,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, JobRecord
from jobs.store.job_store import new_token
from worker.job.attempt import Cancelled, Outcome, Released, run_attempt
from worker.job.context import JobContext
from worker.job.generation import Success, remember_pace
from worker.job.lease import LeaseKeeper
from worker.process.redis_retry import keep_asking

logger = logging.getLogger(__name__)

JOB_CONTEXT: ContextVar[JobContext] = ContextVar("workplace")

CLAIM_PATIENCE_S: Final = 60.0
"""How long a claim is repeated whose answer did not come: it may have been made, and an attempt
that nobody begins would count as lost."""

T = TypeVar("T")


def generate(job_id: str) -> None:
    """Claim the job, run it, and write its outcome; say nothing where there is nothing to do.

    Raises:
        RedisError: the claim could not be made for a minute, or the outcome not be written for ten;
            or either for some seconds when the worker was told to stop at once. RQ may then call
            its job failed; the record stands, and the job is found abandoned.
    """
    place, token = JOB_CONTEXT.get(), new_token()
    try:
        attempt = _surely(
            place, lambda: place.store.claim(job_id, place.worker, token), CLAIM_PATIENCE_S
        )
        logger.info("attempt %d begins", attempt.number)
        # The lease is held until the outcome is written, however long that takes.
        with LeaseKeeper(place.store, attempt, place.journal.outage) as lifeline:
            _run(place, attempt, lifeline)
    except (JobAlreadyFinished, JobNotFound) as error:
        logger.info("nothing to do: %s", error)
    except (JobHeld, StaleAttempt) as error:
        place.job.not_ours = True
        logger.info("nothing to do: %s", error)


def _run(place: JobContext, attempt: Attempt, lifeline: LeaseKeeper) -> None:
    """Raises what `_write` raises."""
    try:
        record = _surely(place, lambda: place.store.get_for(attempt))
    except RecordUnreadable as error:
        # Nobody could run it, and without an end it would count as running for ever.
        logger.error("failed: %s", error)
        failure = Failure(code=error.code, detail=error.detail)
        _surely(place, lambda: place.store.fail(attempt, failure))
        return
    _write(place, attempt, record, run_attempt(place, attempt, record, lifeline))


def _surely(place: JobContext, call: Callable[[], T], patience_s: float | None = None) -> T:
    """Repeat a call until Redis answers; not for long once the worker is to be gone."""
    return keep_asking(call, place.journal.outage, patience_s, lambda: place.drain.give_back)


def _write(place: JobContext, attempt: Attempt, record: JobRecord, outcome: Outcome) -> None:
    """Write the outcome, however long Redis is away: a finished video must not be lost to that.

    Raises:
        StaleAttempt: the job has ended, or went to another attempt. A video that was just stored
            is then deleted: no record names it, so nothing else ever would.
        RedisError: nobody knows whether the outcome was written, so a video stays.
    """
    store = place.store

    def surely(write: Callable[[], object]) -> None:
        _surely(place, write)

    match outcome:
        case Success(video, timings):
            try:
                surely(lambda: store.succeed(attempt, video, timings))
            except StaleAttempt:
                with suppress(ArtifactsUnavailable):  # then the service's housekeeping finds it
                    place.artifacts.delete(video.key)
                raise
            place.journal.succeeded()
            remember_pace(place, record, timings)
            logger.info("succeeded: %s", timings)
        case Failure() as failure:
            surely(lambda: store.fail(attempt, failure))
        case Cancelled():
            surely(lambda: store.cancelled(attempt))
            logger.info("cancelled")
        case Released():
            place.job.not_ours = True
            surely(lambda: store.release(attempt))
            logger.info("given back: the worker was told to stop")
        case _:
            place.job.not_ours = True
            surely(lambda: store.give_up(attempt))
            logger.critical("given up: the device is lost to this process")
