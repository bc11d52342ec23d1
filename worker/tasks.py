"""The only function RQ calls, by name, with a job's id and nothing else.

Where is the engine? `ResidentWorker.execute_job` sets `WORKPLACE` for the length of one job, in the
same thread. A context variable rather than a module global: outside a job there is none, and two
workers in one process (tests) do not see each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar

from jobs.errors import (
    ArtifactsUnavailable,
    JobAlreadyFinished,
    JobHeld,
    JobNotFound,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, JobRecord
from worker.attempt import Cancelled, Outcome, Released, run_attempt
from worker.lifeline import Lifeline
from worker.making import Success, remember_pace
from worker.outage import keep_asking
from worker.workplace import Workplace

logger = logging.getLogger(__name__)

WORKPLACE: ContextVar[Workplace] = ContextVar("workplace")


def generate(job_id: str) -> None:
    """Claim the job, run it, and write its outcome; say nothing where there is nothing to do.

    Raises:
        RedisError: the claim could not be made, or the outcome not be written for ten minutes.
            RQ may then call its job failed; the record stands, and the job is found abandoned.
    """
    place = WORKPLACE.get()
    outage = place.journal.outage
    try:
        attempt = place.store.claim(job_id, place.worker)
        logger.info("attempt %d begins", attempt.number)
        # The lease is held until the outcome is written, however long that takes.
        with Lifeline(place.store, attempt, outage) as lifeline:
            record = keep_asking(lambda: place.store.get_for(attempt), outage)
            outcome = run_attempt(place, attempt, record, lifeline)
            _write(place, attempt, record, outcome)
    except (JobAlreadyFinished, JobNotFound) as error:
        logger.info("nothing to do: %s", error)
    except (JobHeld, StaleAttempt) as error:
        place.job.not_ours = True
        logger.info("nothing to do: %s", error)


def _write(place: Workplace, attempt: Attempt, record: JobRecord, outcome: Outcome) -> None:
    """Write the outcome, however long Redis is away: a finished video must not be lost to that.

    Raises:
        StaleAttempt: the job has ended, or went to another attempt. A video that was just stored
            is then deleted: no record names it, so nothing else ever would.
        RedisError: nobody knows whether the outcome was written, so a video stays.
    """
    store = place.store

    def surely(write: Callable[[], object]) -> None:
        keep_asking(write, place.journal.outage)

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
