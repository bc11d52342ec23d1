"""The only function RQ calls, by name, with a job's id and nothing else.

Where is the engine? `ResidentWorker.execute_job` sets `WORKPLACE` for the length of one job, in the
same thread. A context variable rather than a module global: outside a job there is none, and two
workers in one process (tests) do not see each other's.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

from jobs.errors import JobAlreadyFinished, JobHeld, JobNotFound, StaleAttempt
from jobs.record import Failure
from worker.attempt import Success, Workplace, record_success, run_attempt

logger = logging.getLogger(__name__)

WORKPLACE: ContextVar[Workplace] = ContextVar("workplace")


def generate(job_id: str) -> None:
    """Claim the job, run it, and write its outcome; say nothing where there is nothing to do."""
    place = WORKPLACE.get()
    try:
        attempt = place.store.claim(job_id, place.worker)
        logger.info("attempt %d begins", attempt.number)
        match run_attempt(place, attempt):
            case Success() as success:
                record_success(place, attempt, success)
                logger.info("succeeded: %s", success.timings)
            case Failure() as failure:
                place.store.fail(attempt, failure)
            case _:
                place.store.cancelled(attempt)
                logger.info("cancelled")
    except (JobAlreadyFinished, JobHeld, JobNotFound, StaleAttempt) as error:
        logger.info("nothing to do: %s", error)
