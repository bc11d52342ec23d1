"""Publish a worker's offer and status in the catalog, and recover abandoned jobs, in threads.

Offer and status expire in Redis after 15 seconds and are published every 5. A worker that dies thus
disappears from the catalog soon, and one that runs a long job stays in it. While Redis is
unreachable the threads keep trying. Every second the heartbeat also looks for an operator's order
to take no jobs.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from jobs import catalog
from jobs.catalog import WorkerOffer
from jobs.store.recovery import INTERVAL_S, Recovery
from jobs.store.workers import WorkerStatus, follow_order, publish_status
from worker.process.background import BackgroundThread
from worker.process.drain import Drain
from worker.process.ready_file import ReadyFile
from worker.process.redis_retry import JOIN_TIMEOUT_S, RedisOutage

logger = logging.getLogger(__name__)

PUBLISH_EVERY_S = 5.0

LOOK_EVERY_S = 1.0
"""How often to look for an order to drain or to resume."""


class Heartbeat(BackgroundThread):
    """A context manager that keeps `offer` and a status in the catalog.

    `ready_file`, if there is one, says the same to probes on this machine.

    `close` removes the offer and keeps the status, which a worker publishes until its last job has
    ended. A signal handler may call it: it only wakes the thread, which talks to Redis. While the
    status says that the worker takes no jobs there is no offer either.
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
        self._publish_at = 0.0
        self._drain = Drain()
        self._closed = False
        self.ready_file: ReadyFile | None = None
        # Not an Event: a signal handler must not wait for a lock that its own thread may hold.
        self._wake_ups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # Published here first, so that the worker is in the catalog when it logs that it is ready.
        self._follow_order()
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

    def follow_orders_for(self, drain: Drain) -> None:
        """Put the order to drain into `drain`; call this before the thread starts."""
        self._drain = drain

    def close(self) -> None:
        """Withdraw the offer, so that no more jobs come; return at once."""
        self._closed = True
        self._wake_ups.put(None)

    def refresh(self) -> None:
        """Publish the status now, because it has changed; return at once."""
        self._wake_ups.put(None)

    def _run(self) -> None:
        while True:
            woken = False
            with suppress(queue.Empty):
                self._wake_ups.get(timeout=min(self._publish_every_s, LOOK_EVERY_S))
                woken = True
            if self._done.is_set():
                break
            with self._outage.log_errors():
                if self._follow_order() or woken or time.monotonic() >= self._publish_at:
                    self._publish()
        self._clear_ready_file()
        with suppress(RedisError):
            catalog.withdraw(self._redis, self._offer.worker_id)

    def _clear_ready_file(self) -> None:
        if self.ready_file is not None:
            self.ready_file.clear()

    def _follow_order(self) -> bool:
        """Look for an order to drain or to resume; return whether it is news."""
        before, drain = self._drain.order, self._drain
        drain.order = follow_order(self._redis, self._offer.worker_id, before)
        if (drain.order is None) == (before is None):
            return False
        if drain.order is None:
            logger.info("ordered to take jobs again")
        else:
            logger.info("ordered by %s to take no jobs until told to", drain.order.by)
        return True

    def _publish(self) -> None:
        status = self._status()
        if self._closed or not status.takes_jobs:
            self._clear_ready_file()
            catalog.close(self._redis, self._offer.worker_id)
        else:
            # The tokenizer first, so that no offer names a missing one. And every time, because a
            # Redis that lost its data has lost the tokenizer as well.
            name = self._offer.model.tokenizer
            if name is not None and self._tokenizer is not None:
                catalog.publish_tokenizer(self._redis, name, self._tokenizer)
            catalog.publish(self._redis, self._offer)
            if self.ready_file is not None:
                self.ready_file.mark(self._offer.worker_id)
        publish_status(self._redis, status)
        self._publish_at = time.monotonic() + self._publish_every_s


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
