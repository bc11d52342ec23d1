"""Ends the process when the job in hand shows no sign of life for too long.

A device that hangs is waited for inside native code, where no exception and no signal handler of
Python's reaches the thread. So a thread of its own counts, and what it does in the end is to end
the process: the stacks of all threads go to the log, the job is given up in Redis, and whatever
runs the worker starts it again.

Silence is counted in the thread's own ticks, not by the clock: a process that was stopped as a
whole (SIGSTOP, a suspended machine) has not been silent. Only the last resort goes by the clock,
`NO_THREAD_RUNS_S`.
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

LAST_WORDS_S: Final = 5.0
"""How long Redis may take to hear that the job is given up; its lease runs out anyway."""

NO_THREAD_RUNS_S: Final = 900.0
"""Native code that hangs without letting go of the interpreter stops this thread, too. Then
`faulthandler`, which needs no interpreter, ends the process with status 1 after this long: of real
time, unlike the silence above. A process that was stopped for longer than this may end when it is
continued; its job is another's by then."""

_STDERR = 2


class Watchdog(BackgroundThread):
    """A context in which the job's thread has to call `alive` every now and then."""

    def __init__(
        self,
        limit_s: float,
        last_words: Callable[[], object],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """last_words: is called when the limit is passed; it may fail, hang, or take long."""
        super().__init__("watchdog")
        self._limit_s = limit_s
        self._last_words = last_words
        self._end = end
        self._signs = 0

    def alive(self) -> None:
        """Give a sign of life; as cheap as can be."""
        self._signs += 1

    def allow(self, limit_s: float) -> None:
        """Set how long the silence may last from the last sign on."""
        self._limit_s = limit_s

    def _run(self) -> None:
        signs, silent_s, last = self._signs, 0.0, time.monotonic()
        try:
            while not self._done.wait(TICK_S):
                faulthandler.dump_traceback_later(NO_THREAD_RUNS_S, exit=True, file=_STDERR)
                now = time.monotonic()
                silent_s += min(now - last, 2 * TICK_S)
                last = now
                if self._signs != signs:
                    signs, silent_s = self._signs, 0.0
                elif silent_s > self._limit_s:
                    return self._bite()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _bite(self) -> None:
        logger.critical(
            "no sign of life from the job for %.0f s: its device or a library hangs, and this "
            "process ends with status %d; the stacks of its threads follow",
            self._limit_s,
            EXIT_HUNG,
        )
        faulthandler.dump_traceback(file=_STDERR)
        # Daemon, and waited for no longer than this: it talks to Redis.
        words = threading.Thread(target=self._last_words, name="last-words", daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        self._end(EXIT_HUNG)
