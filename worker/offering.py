"""Keeps a worker's offer in the catalog alive, from a thread of its own.

The offer lives 15 seconds in Redis and is repeated every 5, so a worker that dies is gone from the
catalog soon after, and one that runs a long job is not. When Redis is away the thread goes on
trying: there is nobody to tell.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from jobs import catalog
from jobs.catalog import WorkerOffer

logger = logging.getLogger(__name__)

REPEAT_EVERY_S = 5.0


class StandingOffer:
    """A context in which `offer` is in the catalog; `end()` takes it out early.

    `end()` only sets an event, so a signal handler may call it: the thread does the talking to
    Redis.
    """

    def __init__(self, redis: Redis, offer: WorkerOffer) -> None:
        self._redis = redis
        self._offer = offer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="standing-offer", daemon=True)

    def __enter__(self) -> Self:
        # The first one from here, so that the worker is in the catalog when it says it is ready.
        catalog.publish(self._redis, self._offer)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        self._thread.join()

    def end(self) -> None:
        """Have the offer withdrawn; returns at once."""
        self._ended.set()

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_EVERY_S):
            self._try(lambda: catalog.publish(self._redis, self._offer))
        self._try(lambda: catalog.withdraw(self._redis, self._offer.worker_id))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RedisError as error:
            logger.warning("the catalog cannot be reached: %s", error)
