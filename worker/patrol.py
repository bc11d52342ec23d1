"""Looks after abandoned jobs from a thread of its own, also while this worker runs a job."""

from __future__ import annotations

from redis import Redis

from jobs.store.recovery import EVERY_S, Recovery
from worker.companion import Companion
from worker.outage import END_WAIT_S, Outage


class Patrol(Companion):
    """A context in which jobs that nobody works on are found and put back."""

    def __init__(self, redis: Redis, outage: Outage, every_s: float = EVERY_S) -> None:
        super().__init__("patrol", END_WAIT_S)
        self._recovery = Recovery(redis)
        self._outage = outage
        self._every_s = every_s

    def _run(self) -> None:
        while True:
            with self._outage.survived():
                self._recovery.run()
            if self._done.wait(self._every_s):
                break
