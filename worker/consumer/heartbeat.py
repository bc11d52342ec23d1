"""Publish a worker's offer and status in the catalog, and recover abandoned jobs, in threads.

Offer and status expire in Redis after 15 seconds and are published every 5. A worker that dies thus
disappears from the catalog soon, and one that runs a long job stays in it. While Redis is
unreachable the threads keep trying.
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
from jobs.store.recovery import INTERVAL_S, Recovery
from worker.process.background import BackgroundThread
from worker.process.redis_retry import JOIN_TIMEOUT_S, RedisOutage

PUBLISH_EVERY_S = 5.0


class Heartbeat(BackgroundThread):
    """A context manager that keeps `offer` and a status in the catalog.

    `close` removes the offer and keeps the status, which a worker publishes until its last job has
    ended. A signal handler may call it: it only wakes the thread, which talks to Redis. While the
    status says that the worker is degraded there is no offer either.
    """

    def __init__(
        self,
        redis: Redis,
        offer: WorkerOffer,
        tokenizer: bytes | None,
        status: Callable[[], WorkerStatus],
        outage: RedisOutage,
        publish_every_s: float = PUBLISH_EVERY_S,
    ) -> None:
        """Prepare the thread.

        Args:
            tokenizer: the text of the tokenizer that the offer names; published with the offer.
            status: computes the status; called from the thread.
        """
        super().__init__("heartbeat", JOIN_TIMEOUT_S)
        self._redis = redis
        self._offer = offer
        self._tokenizer = tokenizer
        self._status = status
        self._outage = outage
        self._publish_every_s = publish_every_s
        self._closed = False
        # Not an Event: a signal handler must not wait for a lock that its own thread may hold.
        self._wake_ups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # Published here first, so that the worker is in the catalog when it logs that it is ready.
        self._publish()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._wake_ups.put(None)
        super().__exit__(kind, error, trace)

    def close(self) -> None:
        """Withdraw the offer, so that no more jobs come; return at once."""
        self._closed = True
        self._wake_ups.put(None)

    def refresh(self) -> None:
        """Publish the status now, because it has changed; return at once."""
        self._wake_ups.put(None)

    def _run(self) -> None:
        while True:
            with suppress(queue.Empty):
                self._wake_ups.get(timeout=self._publish_every_s)
            if self._done.is_set():
                break
            with self._outage.log_errors():
                self._publish()
        with suppress(RedisError):
            catalog.withdraw(self._redis, self._offer.worker_id)

    def _publish(self) -> None:
        status = self._status()
        if self._closed or status.state == "degraded":
            catalog.close(self._redis, self._offer.worker_id)
        else:
            # The tokenizer first, so that no offer names a missing one. And every time, because a
            # Redis that lost its data has lost the tokenizer as well.
            name = self._offer.model.tokenizer
            if name is not None and self._tokenizer is not None:
                catalog.publish_tokenizer(self._redis, name, self._tokenizer)
            catalog.publish(self._redis, self._offer)
        catalog.publish_status(self._redis, status)


class RecoveryThread(BackgroundThread):
    """A context manager that looks for abandoned jobs every few seconds and requeues them."""

    def __init__(self, redis: Redis, outage: RedisOutage, every_s: float = INTERVAL_S) -> None:
        super().__init__("recovery", JOIN_TIMEOUT_S)
        self._recovery = Recovery(redis)
        self._outage = outage
        self._every_s = every_s

    def _run(self) -> None:
        while True:
            with self._outage.log_errors():
                self._recovery.run()
            if self._done.wait(self._every_s):
                break
