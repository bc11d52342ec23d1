"""End the process when the current job shows no sign of life for too long.

A thread that waits for a hanging device is inside native code, where neither a Python exception nor
a signal handler reaches it. So another thread counts the silence and finally ends the process: the
stacks of all threads go to the log, the job is given up in Redis, and the process supervisor starts
the worker again.

The silence is added up in steps of at most two ticks (`TICK_S`). So the time in which the whole
process was stopped (SIGSTOP, a suspended machine) hardly counts. Only `NO_THREAD_RUNS_S` is real
time.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from worker.errors import EXIT_HUNG
from worker.process.background import BackgroundThread

logger = logging.getLogger(__name__)

TICK_S: Final = 0.5
"""How often the thread checks for a sign of life."""

ON_HANG_TIMEOUT_S: Final = 5.0
"""How long giving up the job in Redis may take; without it, the job's lease expires later."""

NO_THREAD_RUNS_S: Final = 900.0
"""The limit if not even the watchdog's thread can run, because native code hangs while it holds the
interpreter lock. `faulthandler` needs no lock and then ends the process with status 1. This is real
time: a process that was stopped for longer may end so when it is continued. Another worker has its
job by then."""

_STDERR = 2


class Watchdog(BackgroundThread):
    """A context manager whose thread ends the process once `alive` is not called for too long."""

    def __init__(
        self,
        limit_s: float,
        on_hang: Callable[[], object],
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the thread.

        Args:
            limit_s: how long the silence may last at first.
            on_hang: called when the limit is passed; it may fail, hang, or take long.
            end: called with the exit status, to end the process.
            clock: returns seconds that only grow.
        """
        super().__init__("watchdog")
        self._limit_s = limit_s
        self._on_hang = on_hang
        self._end = end
        self._clock = clock
        self._alive_count = 0

    def alive(self) -> None:
        """Give a sign of life; called so often that it must cost almost nothing."""
        self._alive_count += 1

    def set_limit(self, limit_s: float) -> None:
        """Set how long the silence may last from the last sign of life on."""
        self._limit_s = limit_s

    def _run(self) -> None:
        count, silent_s, last = self._alive_count, 0.0, self._clock()
        try:
            while not self._done.wait(TICK_S):
                faulthandler.dump_traceback_later(NO_THREAD_RUNS_S, exit=True, file=_STDERR)
                now = self._clock()
                silent_s += min(now - last, 2 * TICK_S)
                last = now
                if self._alive_count != count:
                    count, silent_s = self._alive_count, 0.0
                elif silent_s > self._limit_s:
                    return self._end_process()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end_process(self) -> None:
        logger.critical(
            "no sign of life from the job for %.0f s: its device or a library hangs, and this "
            "process ends with status %d; the stacks of its threads follow",
            self._limit_s,
            EXIT_HUNG,
        )
        faulthandler.dump_traceback(file=_STDERR)
        # A daemon with a time limit, because it talks to Redis.
        thread = threading.Thread(target=self._on_hang, name="on-hang", daemon=True)
        thread.start()
        thread.join(ON_HANG_TIMEOUT_S)
        self._end(EXIT_HUNG)
