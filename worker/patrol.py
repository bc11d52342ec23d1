"""Looks after abandoned jobs from a thread of its own, also while this worker runs a job."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from redis import Redis

from jobs.recovery import EVERY_S, Recovery
from worker.outage import END_WAIT_S, Outage


class Patrol:
    """A context in which jobs that nobody works on are found and put back."""

    def __init__(self, redis: Redis, outage: Outage, every_s: float = EVERY_S) -> None:
        self._recovery = Recovery(redis)
        self._outage = outage
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="patrol", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        # No longer than this: it may wait for a Redis, or ask a device, that will not answer.
        self._thread.join(END_WAIT_S)

    def _run(self) -> None:
        while True:
            with self._outage.survived():
                self._recovery.run()
            if self._done.wait(self._every_s):
                break
