"""Lease due webhooks from the outbox and deliver them, several calls at a time.

Every service process runs a dispatcher. A webhook is leased to one of them at a time. When a
process is killed, its leases expire, and other processes deliver its webhooks.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from redis.exceptions import RedisError

from jobs.store.webhook_outbox import Lease, Outbox

logger = logging.getLogger(__name__)

MAX_CALLS: Final = 16
"""The most calls under way in one process."""
POLL_EVERY_S: Final = 0.25
GRACE_S: Final = 1.0
"""How long the calls under way may still take once the process is stopping."""
THREADS: Final = 4 * MAX_CALLS
"""Threads for Redis calls and name resolution. There are more than calls, because the system's
resolver may block a thread for longer than a call may take."""

Deliver = Callable[[Lease], Awaitable[None]]


class Dispatcher:
    """Leases webhooks and starts their deliveries until it is asked to end."""

    def __init__(self, outbox: Outbox, deliver: Deliver) -> None:
        self._outbox = outbox
        self._deliver = deliver

    def run(self, ending: threading.Event) -> None:
        """Deliver until `ending` is set.

        Raises:
            RedisError: the outbox cannot be read. The calls under way are finished first.
        """
        asyncio.run(self._run(ending))

    async def _run(self, ending: threading.Event) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "webhooks"))
        under_way: dict[asyncio.Task[None], Lease] = {}
        try:
            while not ending.is_set():
                if room := MAX_CALLS - len(under_way):
                    for lease in await asyncio.to_thread(self._outbox.take, room):
                        under_way[asyncio.create_task(self._deliver_one(lease))] = lease
                await asyncio.sleep(POLL_EVERY_S)
                for task in [each for each in under_way if each.done()]:
                    del under_way[task]
        except RedisError:
            if under_way:
                await asyncio.wait(under_way)
            raise
        finally:
            await self._end(under_way)

    async def _end(self, under_way: dict[asyncio.Task[None], Lease]) -> None:
        """Wait `GRACE_S` for the calls under way; cancel the rest, and end their leases."""
        if not under_way:
            return
        _, pending = await asyncio.wait(under_way, timeout=GRACE_S)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in pending:
            try:
                await asyncio.to_thread(self._outbox.postpone, under_way[task], 0.0)
            except RedisError:
                # The leases run out by themselves.
                return

    async def _deliver_one(self, lease: Lease) -> None:
        try:
            await self._deliver(lease)
        except RedisError as error:
            # The lease runs out by itself, and then the webhook is tried again.
            logger.warning("the webhook of job %s is left for later: %s", lease.job_id, error)
