"""Keeps a worker's offer and its status in the catalog, from a thread of its own.

Both live 15 seconds in Redis and are repeated every 5, so a worker that dies is gone from the
catalog soon after, and one that runs a long job is not. When Redis is away the thread goes on
trying: there is nobody to tell.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from jobs import catalog
from jobs.catalog import WorkerOffer, WorkerStatus
from jobs.store.recovery import EVERY_S, Recovery
from worker.process.background import BackgroundThread
from worker.process.redis_retry import END_WAIT_S, RedisOutage

REPEAT_EVERY_S = 5.0


class Heartbeat(BackgroundThread):
    """A context in which `offer` and a status are in the catalog.

    `close` takes the offer out and leaves the status, which a worker has until its last job is
    done. A signal handler may call it: it only rings a bell, and the thread does the talking.
    """

    def __init__(
        self,
        redis: Redis,
        offer: WorkerOffer,
        tokenizer: bytes | None,
        status: Callable[[], WorkerStatus],
        outage: RedisOutage,
        repeat_every_s: float = REPEAT_EVERY_S,
    ) -> None:
        """tokenizer: the text that the offer names; it is kept in the catalog with the offer."""
        super().__init__("standing-offer", END_WAIT_S)
        self._redis = redis
        self._offer = offer
        self._tokenizer = tokenizer
        self._status = status
        self._outage = outage
        self._repeat_every_s = repeat_every_s
        self._closed = False
        # No Event rings it: a handler must not wait for a lock that its own thread may hold.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # The first one from here, so that the worker is in the catalog when it says it is ready.
        self._repeat()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._bell.put(None)
        super().__exit__(kind, error, trace)

    def close(self) -> None:
        """Take no more jobs; returns at once."""
        self._closed = True
        self._bell.put(None)

    def refresh(self) -> None:
        """Publish the status now: it has changed; returns at once."""
        self._bell.put(None)

    def _run(self) -> None:
        while True:
            with suppress(queue.Empty):
                self._bell.get(timeout=self._repeat_every_s)
            if self._done.is_set():
                break
            with self._outage.survived():
                self._repeat()
        with suppress(RedisError):
            catalog.withdraw(self._redis, self._offer.worker_id)

    def _repeat(self) -> None:
        if self._closed:
            catalog.close(self._redis, self._offer.worker_id)
        else:
            # The tokenizer first, so that no offer names one that is not there; again with every
            # repetition, because a Redis that lost its data has lost it too.
            name = self._offer.model.tokenizer
            if name is not None and self._tokenizer is not None:
                catalog.publish_tokenizer(self._redis, name, self._tokenizer)
            catalog.publish(self._redis, self._offer)
        catalog.publish_status(self._redis, self._status())


class RecoveryThread(BackgroundThread):
    """A context in which jobs that nobody works on are found and put back."""

    def __init__(self, redis: Redis, outage: RedisOutage, every_s: float = EVERY_S) -> None:
        super().__init__("patrol", END_WAIT_S)
        self._recovery = Recovery(redis)
        self._outage = outage
        self._every_s = every_s

    def _run(self) -> None:
        while True:
            with self._outage.survived():
                self._recovery.run()
            if self._done.wait(self._every_s):
                break
