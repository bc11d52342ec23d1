"""Redis goes away and comes back; a worker with its model stays.

Every thread of a worker that talks to Redis reports to one `RedisOutage`, so the log says once that
Redis has gone and once that it is back, however many ask in between.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from redis.backoff import EqualJitterBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long what must not be lost is offered to a Redis that is away."""

HURRIED_S = 10.0
"""The same, once whoever runs the worker wants it gone: the last try may take as long again."""

LONGEST_PAUSE_S = 2.0
"""Of what jobs wait for. Leases are not judged for longer than this after Redis is back."""

END_WAIT_S = 5.0
"""How long the end of a worker waits for a thread beside its jobs. They are daemons."""


class RedisOutage:
    """What is known of Redis: here, or away since some time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever is asked of Redis inside shows whether it is there; errors pass through."""
        try:
            yield
        except RedisError as error:
            self.began(error)
            raise
        self.ended()

    @contextmanager
    def survived(self) -> Iterator[None]:
        """For threads that nobody would miss if they ended: whatever goes wrong inside is logged,
        an outage once, and passed over."""
        try:
            with self.watched():
                yield
        except RedisError:
            pass
        except Exception:
            logger.exception("a thread beside the job goes on after an error")

    def began(self, error: RedisError) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                logger.warning("Redis is away, which is waited for: %s", error)

    def ended(self) -> None:
        with self._lock:
            if self._since is not None:
                logger.warning("Redis is back after %.1f s", time.monotonic() - self._since)
                self._since = None


class Backoff:
    """How long to wait after each failure: twice as long each time, up to a limit, with jitter."""

    def __init__(self, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._backoff = EqualJitterBackoff(cap=longest_s, base=0.05)
        self._failures = 0

    def next_s(self) -> float:
        self._failures = min(self._failures + 1, 30)
        return float(self._backoff.compute(self._failures))

    def reset(self) -> None:
        self._failures = 0


def keep_asking(
    call: Callable[[], T],
    outage: RedisOutage,
    patience_s: float | None = None,
    hurried: Callable[[], bool] = lambda: False,
) -> T:
    """Repeat a call that may be repeated until Redis answers it.

    patience_s: PATIENCE_S if None.
    hurried: whether patience is HURRIED_S from now on at the most.

    Raises:
        RedisError: the last one, when patience has run out, and at once one that would come again.
            Whatever else the call raises, at once.
    """
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    pauses, in_a_hurry = Backoff(), False
    while True:
        try:
            with outage.watched():
                return call()
        except RedisError as error:
            if not _may_pass(error) or time.monotonic() > deadline:
                raise
        if hurried() and not in_a_hurry:
            in_a_hurry, deadline = True, min(deadline, time.monotonic() + HURRIED_S)
        time.sleep(pauses.next_s())


def _may_pass(error: RedisError) -> bool:
    """Whether Redis is away, or is there and takes nothing for now."""
    kinds = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError)
    refusals = ("MISCONF", "NOREPLICAS", "MASTERDOWN")  # a full disk, a failover
    return isinstance(error, kinds) or (
        isinstance(error, ResponseError) and str(error).startswith(refusals)
    )
