"""Retry Redis commands across an outage, so that a worker keeps its loaded model.

All threads of a worker that use Redis share one `RedisOutage`. An outage is thus logged once when
it begins and once when it ends, however many commands fail in between.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError

from jobs.redis_client import explain, is_transient

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_TIMEOUT_S = 600.0
"""How long a command whose effect must not be lost is repeated while Redis is unreachable."""

SHUTDOWN_TIMEOUT_S = 10.0
"""The same once the worker is stopping; the last attempt may take as long again."""

MAX_PAUSE_S = 2.0
"""Longest pause between two attempts of a command that a job waits for. When Redis is back, expired
leases are tolerated for longer (`jobs/store/recovery.py`)."""

JOIN_TIMEOUT_S = 5.0
"""How long the end of a worker waits for each of its background threads, which are daemons."""


class RedisOutage:
    """The state of the connection to Redis: reachable, or unreachable since some moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._refusal: str | None = None

    @contextmanager
    def track(self) -> Iterator[None]:
        """Update the state from the Redis commands of the block; errors propagate."""
        try:
            yield
        except RedisError as error:
            self.mark_down(error)
            raise
        self.mark_up()

    @contextmanager
    def log_errors(self) -> Iterator[None]:
        """Log and swallow every error of the block, an outage once.

        For background threads, whose end because of an error would go unnoticed.
        """
        try:
            with self.track():
                yield
        except RedisError:
            pass
        except Exception:
            logger.exception("a thread beside the job goes on after an error")

    def mark_down(self, error: RedisError) -> None:
        """Note that a command failed; log it if Redis was reachable until now.

        What Redis refuses for good is no outage. It is logged, too, but not again and again.
        """
        with self._lock:
            if not is_transient(error):
                if explain(error) != self._refusal:
                    self._refusal = explain(error)
                    logger.error(self._refusal)
            elif self._since is None:
                self._since = time.monotonic()
                logger.warning("Redis is away; waiting for it: %s", error)

    def mark_up(self) -> None:
        """Note that Redis has answered; log it if it was unreachable until now."""
        with self._lock:
            if self._since is not None:
                logger.warning("Redis is back after %.1f s", time.monotonic() - self._since)
                self._since = None


class Backoff:
    """Compute the pause after each failure: doubled each time, up to a limit, with jitter."""

    def __init__(self, max_s: float = MAX_PAUSE_S) -> None:
        self._backoff = EqualJitterBackoff(cap=max_s, base=0.05)
        self._failures = 0

    def next_s(self) -> float:
        """Count one more failure, and return the pause after it."""
        self._failures = min(self._failures + 1, 30)
        return float(self._backoff.compute(self._failures))

    def reset(self) -> None:
        """Start again with the shortest pause."""
        self._failures = 0


def retry_until_answered(
    call: Callable[[], T],
    outage: RedisOutage,
    timeout_s: float | None = None,
    shutting_down: Callable[[], bool] = lambda: False,
) -> T:
    """Repeat an idempotent call until Redis answers it.

    Args:
        timeout_s: how long; RETRY_TIMEOUT_S if None.
        shutting_down: once it returns True, at most SHUTDOWN_TIMEOUT_S more are spent.

    Raises:
        RedisError: the last one, when the time is over; at once, one that a repetition would not
            change. Any other exception of the call is raised at once.
    """
    deadline = time.monotonic() + (RETRY_TIMEOUT_S if timeout_s is None else timeout_s)
    backoff, shortened = Backoff(), False
    while True:
        try:
            with outage.track():
                return call()
        except RedisError as error:
            if not is_transient(error) or time.monotonic() > deadline:
                raise
        if shutting_down() and not shortened:
            shortened, deadline = True, min(deadline, time.monotonic() + SHUTDOWN_TIMEOUT_S)
        time.sleep(backoff.next_s())
