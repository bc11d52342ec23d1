"""One running job's line to Redis: progress out, the wish to stop in.

The engine asks hundreds of times a second; Redis is asked and told a few times a second. Nothing
runs beside the job here: everything happens when the engine calls, in the thread that runs the job.
"""

from __future__ import annotations

import threading
import time

from jobs.errors import GenerationCancelled
from jobs.record import Attempt, Progress, Stage
from jobs.store import JobStore

ASK_EVERY_S = 0.05
"""A cancel is seen at most this much later than the engine's next check."""

TELL_EVERY_S = 0.25
"""Faster steps are published in part; the first and the last of a stage always are."""


class JobWatch:
    """The `Watch` of one attempt."""

    def __init__(self, store: JobStore, attempt: Attempt, stop: threading.Event) -> None:
        self._store = store
        self._attempt = attempt
        self._stop = stop
        self._asked = self._told = -float("inf")

    def check(self) -> None:
        """Raise if the job is to stop.

        Raises:
            GenerationCancelled: its caller, or RQ's stop command, wants it to.
            StaleAttempt: another attempt owns the job by now.
        """
        if self._stop.is_set():
            raise GenerationCancelled("The job was stopped by RQ's stop command.")
        now = time.monotonic()
        if now - self._asked < ASK_EVERY_S:
            return
        self._asked = now
        if self._store.cancel_requested(self._attempt):
            raise GenerationCancelled("The job was cancelled while it ran.")

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Publish progress unless the last word is too fresh; raises what `check` raises."""
        self.check()
        now = time.monotonic()
        if 0 < step < steps and now - self._told < TELL_EVERY_S:
            return
        self._told = now
        self._store.progress(self._attempt, Progress(stage=stage, step=step, steps=steps))
