"""A running attempt's line to Redis, in a thread of its own: lease and progress out, the wish to
stop in.

The engine's thread never waits for Redis: it leaves progress here and reads whether to stop. So a
Redis that is away, or hangs, costs a job nothing; when it is back the lease is renewed first of
all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Final

from redis.exceptions import RedisError

from jobs.errors import AppError, GenerationCancelled, StaleAttempt
from jobs.record import Attempt, Progress
from jobs.store.job_store import LEASE_S, JobStore
from worker.process.background import BackgroundThread
from worker.process.redis_retry import Backoff, RedisOutage

logger = logging.getLogger(__name__)

RENEW_EVERY_S: Final = LEASE_S / 5

ASK_EVERY_S: Final = 0.05
"""A cancel is known here at most this much later."""

TELL_EVERY_S: Final = 0.25
"""Faster steps are published in part; the first and the last of a stage always are."""


class LeaseKeeper(BackgroundThread):
    """A context in which `attempt` stays alive in Redis.

    Attributes:
        stop: why the attempt is to end, once that is known: GenerationCancelled or StaleAttempt.
    """

    def __init__(self, store: JobStore, attempt: Attempt, outage: RedisOutage) -> None:
        super().__init__("lifeline")
        self.stop: AppError | None = None
        self._store = store
        self._attempt = attempt
        self._outage = outage
        self._untold: deque[Progress] = deque()
        self._lock = threading.Lock()
        self._renew_at = time.monotonic() + RENEW_EVERY_S
        self._told_at = -float("inf")

    def tell(self, progress: Progress) -> None:
        """Have progress published; what is overtaken before its turn is left out."""
        with self._lock:
            if self._untold and not _is_edge(self._untold[-1]):
                self._untold.pop()
            self._untold.append(progress)

    def _run(self) -> None:
        pauses, pause_s = Backoff(), ASK_EVERY_S
        while not self._done.wait(pause_s):
            try:
                with self._outage.watched():
                    self._ask()
                    self._publish()
                pauses.reset()
                pause_s = ASK_EVERY_S
            except StaleAttempt as error:
                self.stop = error
                return
            except Exception as error:
                # Whatever it is, a job must not lose its lease to it.
                if not isinstance(error, RedisError):
                    logger.exception("the lease is asked for again")
                self._renew_at = 0
                pause_s = pauses.next_s()

    def _ask(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            wanted = self._store.renew(self._attempt)
            self._renew_at = now + RENEW_EVERY_S
        else:
            wanted = self._store.cancel_requested(self._attempt)
        if wanted:
            self.stop = GenerationCancelled("The job was cancelled while it ran.")

    def _publish(self) -> None:
        while self._untold:
            with self._lock:
                progress = self._untold[0]
            now = time.monotonic()
            if not _is_edge(progress) and now - self._told_at < TELL_EVERY_S:
                return
            self._store.progress(self._attempt, progress)
            self._told_at = now
            with self._lock:
                if self._untold[0] is progress:
                    self._untold.popleft()


def _is_edge(progress: Progress) -> bool:
    return progress.step in (0, progress.steps)
