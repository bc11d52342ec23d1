"""Run one job: the only function that RQ calls, by name, with a job's id as its only argument.

It finds the engine in `JOB_CONTEXT`, which `ResidentWorker.execute_job` sets for the duration of a
job, in the same thread. A context variable rather than a module global: it is unset outside a job,
and two workers in one process (tests) do not see each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Final, TypeVar

from jobs import durations
from jobs.errors import (
    ArtifactsUnavailable,
    JobAlreadyFinished,
    JobHeld,
    JobNotFound,
    RecordUnreadable,
    StaleAttempt,
    WorkerLost,
    WorkerUnfit,
)
from jobs.record import Attempt, Failure, JobRecord
from jobs.store.job_store import new_token
from jobs.telemetry import job_spans
from jobs.telemetry.job_spans import TracedAttempt
from jobs.telemetry.tracing import Span
from worker.job.attempt import Cancelled, Outcome, Released, Unfit, run_attempt
from worker.job.context import JobContext
from worker.job.generation import Success, record_durations
from worker.job.lease import LeaseKeeper
from worker.process.redis_retry import retry_until_answered

logger = logging.getLogger(__name__)

JOB_CONTEXT: ContextVar[JobContext] = ContextVar("job_context")

CLAIM_TIMEOUT_S: Final = 60.0
"""How long a claim without an answer is repeated. Redis may have made it, and an attempt that is
never started would count as lost."""

T = TypeVar("T")


def generate(job_id: str) -> None:
    """Claim the job, run it and write its outcome; do nothing if it ended or another worker has it.

    Raises:
        RedisError: the claim could not be made for a minute, or the outcome could not be written
            for ten; for some seconds when the worker was asked to return its job. RQ may then mark
            its own job as failed. The record is unaffected, and recovery finds the job abandoned.
    """
    context, token = JOB_CONTEXT.get(), new_token()
    try:
        attempt = _retry(
            context, lambda: context.store.claim(job_id, context.worker, token), CLAIM_TIMEOUT_S
        )
        logger.info("attempt %d begins", attempt.number)
        # The lease is held until the outcome is written, however long that takes.
        with LeaseKeeper(context.store, attempt, context.stats.outage) as lease:
            _run(context, attempt, lease)
    except (JobAlreadyFinished, JobNotFound) as error:
        logger.info("nothing to do: %s", error)
    except RecordUnreadable as error:
        # Not this worker's to run, nor to fail: recovery delivers it again in some seconds.
        context.job.owned_elsewhere = True
        logger.warning("left to a worker of another version: %s", error)
    except (JobHeld, StaleAttempt) as error:
        context.job.owned_elsewhere = True
        logger.info("nothing to do: %s", error)


def _run(context: JobContext, attempt: Attempt, lease: LeaseKeeper) -> None:
    """Run the claimed job; raises what `_write` raises."""
    try:
        record = _retry(context, lambda: context.store.get_for(attempt))
    except RecordUnreadable as error:
        # No worker could run it, and unless it is ended it would count as running for ever.
        logger.error("failed: %s", error)
        failure = Failure(code=error.code, detail=error.detail)
        _retry(context, lambda: context.store.fail(attempt, failure))
        return
    with job_spans.attempt(_traced(context, attempt, record)) as span:
        outcome = run_attempt(context, attempt, record, lease)
        _describe(outcome, span)
        _write(context, attempt, record, outcome)


def _traced(context: JobContext, attempt: Attempt, record: JobRecord) -> TracedAttempt:
    return TracedAttempt(
        job_id=attempt.job_id,
        number=attempt.number,
        queue=record.queue,
        worker=context.worker,
        shape=durations.shape(record.request),
        context=record.trace,
    )


def _describe(outcome: Outcome, span: Span) -> None:
    """Say on the span of an attempt how it ended."""
    match outcome:
        case Success():
            name, code = "succeeded", None
        case Failure():
            name, code = "failed", outcome.code
        case Cancelled():
            name, code = "cancelled", None
        case Released():
            name, code = "released", None
        case Unfit():
            name, code = "unfit", WorkerUnfit.code
        case _:
            name, code = "device_lost", WorkerLost.code
    span.set({"wan.outcome": name})
    if code is not None:
        span.fail(code)


def _retry(context: JobContext, call: Callable[[], T], timeout_s: float | None = None) -> T:
    """Repeat a call until Redis answers; for some seconds only once the job is to be returned."""
    return retry_until_answered(
        call, context.stats.outage, timeout_s, lambda: context.drain.return_job
    )


def _write(context: JobContext, attempt: Attempt, record: JobRecord, outcome: Outcome) -> None:
    """Write the outcome, also across an outage of Redis, which must not lose a finished video.

    Raises:
        StaleAttempt: the job has ended, or belongs to another attempt. A video that was just stored
            is then deleted with its pictures, because no record names it.
        RedisError: it is unknown whether the outcome was written, so a stored video is kept.
    """
    store = context.store

    def retry(write: Callable[[], object]) -> None:
        _retry(context, write)

    match outcome:
        case Success(video, timings):
            try:
                retry(lambda: store.succeed(attempt, video, timings))
            except StaleAttempt:
                with suppress(ArtifactsUnavailable):  # then the service's retention task does it
                    for key in video.keys:
                        context.artifacts.delete(key)
                raise
            context.stats.record_success(video.bytes)
            record_durations(context, record, timings)
            logger.info("succeeded: %s", timings)
        case Failure() as failure:
            retry(lambda: store.fail(attempt, failure))
        case Cancelled():
            retry(lambda: store.cancelled(attempt))
            logger.info("cancelled")
        case Released():
            context.job.owned_elsewhere = True
            retry(lambda: store.release(attempt))
            logger.info("given back: the worker was told to stop")
        case Unfit(reason):
            context.job.owned_elsewhere = True
            retry(lambda: store.hand_back(attempt, reason))
            logger.error("given back, and no job taken until this is mended: %s", reason)
        case _:
            context.job.owned_elsewhere = True
            retry(lambda: store.give_up(attempt))
            logger.critical("given up: the device is lost to this process")
