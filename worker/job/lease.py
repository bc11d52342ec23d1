"""Renew a running attempt's lease, publish its progress and detect its cancellation, in a thread.

The job's thread never waits for Redis: it hands over its progress and reads an attribute to learn
whether to stop. So an unreachable or hanging Redis does not delay a job. When Redis is back, the
lease is renewed before anything else.
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

CHECK_EVERY_S: Final = 0.05
"""How often to look for a cancellation."""

PUBLISH_EVERY_S: Final = 0.25
"""Steps that follow faster are skipped, except the first and the last of a stage."""


class LeaseKeeper(BackgroundThread):
    """A context manager that keeps the lease of `attempt` while its thread runs.

    Attributes:
        stop: why the attempt must end, once known: GenerationCancelled or StaleAttempt.
    """

    def __init__(self, store: JobStore, attempt: Attempt, outage: RedisOutage) -> None:
        super().__init__("lease")
        self.stop: AppError | None = None
        self._store = store
        self._attempt = attempt
        self._outage = outage
        self._pending: deque[Progress] = deque()
        self._lock = threading.Lock()
        self._renew_at = time.monotonic() + RENEW_EVERY_S
        self._published_at = -float("inf")

    def publish(self, progress: Progress) -> None:
        """Have the thread publish `progress`; it replaces an older step that is still pending."""
        with self._lock:
            if self._pending and not _is_edge(self._pending[-1]):
                self._pending.pop()
            self._pending.append(progress)

    def _run(self) -> None:
        backoff, pause_s = Backoff(), CHECK_EVERY_S
        while not self._done.wait(pause_s):
            try:
                with self._outage.track():
                    self._renew_or_check()
                    self._publish_pending()
                backoff.reset()
                pause_s = CHECK_EVERY_S
            except StaleAttempt as error:
                self.stop = error
                return
            except Exception as error:
                # No error may end this thread, or the job would lose its lease.
                if not isinstance(error, RedisError):
                    logger.exception("the lease is asked for again")
                self._renew_at = 0
                pause_s = backoff.next_s()

    def _renew_or_check(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            cancelled = self._store.renew(self._attempt)
            self._renew_at = now + RENEW_EVERY_S
        else:
            cancelled = self._store.cancel_requested(self._attempt)
        if cancelled:
            self.stop = GenerationCancelled("The job was cancelled while it ran.")

    def _publish_pending(self) -> None:
        while self._pending:
            with self._lock:
                progress = self._pending[0]
            now = time.monotonic()
            if not _is_edge(progress) and now - self._published_at < PUBLISH_EVERY_S:
                return
            self._store.progress(self._attempt, progress)
            self._published_at = now
            with self._lock:
                if self._pending[0] is progress:
                    self._pending.popleft()


def _is_edge(progress: Progress) -> bool:
    return progress.step in (0, progress.steps)
