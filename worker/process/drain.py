"""Record requests to stop the worker, and an operator's order to take no jobs.

Signal handlers set plain attributes here. They run in the main thread between any two of its
instructions, so they must not wait for a lock: the main thread may be holding it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from jobs.store.workers import DrainOrder
from worker.settings import DrainChoice

SAME_REQUEST_S: Final = 1.0
"""Signals within this time count as one request: a terminal and a launcher may each send one."""


class Drain:
    """The requests to stop this process: whether it stops, and what it does with its current job.

    Attributes:
        stopping: the worker takes no further job.
        return_job: the current job is returned to the queue instead of being finished here.
        order: while there is one, the process lives on and takes no further job. It outlives every
            loss of Redis, and the worker ids that follow each other in this process.
        waiting: whether the worker obeys the order: it has ended its last job, and asks for none.
    """

    def __init__(self, choice: DrainChoice = "finish") -> None:
        self.stopping = False
        self.return_job = False
        self.order: DrainOrder | None = None
        self.waiting = False
        self._choice = choice
        self._requested_at = 0.0

    def request_stop(self) -> None:
        """Stop the worker as configured; a second request returns the current job at once."""
        now = time.monotonic()
        if not self.stopping:
            self._requested_at = now
            self.return_job = self._choice == "requeue"
            self.stopping = True
        elif now - self._requested_at >= SAME_REQUEST_S:
            self.return_job = True


@dataclass(slots=True)
class CurrentJob:
    """The delivery of a job that the worker is running.

    Attributes:
        stop: RQ's stop command asked for its end.
        owned_elsewhere: the job is queued again, or another worker runs it, so RQ must not mark it
            as finished.
    """

    job_id: str
    stop: bool = False
    owned_elsewhere: bool = False
