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

    def __init__(
        self,
        redis: Redis,
        offer: WorkerOffer,
        tokenizer: str | None,
        repeat_every_s: float = REPEAT_EVERY_S,
    ) -> None:
        """tokenizer: the text that the offer names; it is kept in the catalog with the offer."""
        self._redis = redis
        self._offer = offer
        self._tokenizer = tokenizer
        self._repeat_every_s = repeat_every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="standing-offer", daemon=True)

    def __enter__(self) -> Self:
        # The first one from here, so that the worker is in the catalog when it says it is ready.
        self._publish()
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
        while not self._ended.wait(self._repeat_every_s):
            self._try(self._publish)
        self._try(lambda: catalog.withdraw(self._redis, self._offer.worker_id))

    def _publish(self) -> None:
        # The tokenizer first, so that no offer names one that is not there; again with every
        # repetition, because a Redis that lost its data has lost it too.
        if self._tokenizer is not None:
            catalog.publish_tokenizer(self._redis, self._tokenizer)
        catalog.publish(self._redis, self._offer)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RedisError as error:
            logger.warning("the catalog cannot be reached: %s", error)
