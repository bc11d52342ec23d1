"""Takes what is due out of the outbox and has it delivered, several calls at a time.

Runs in every service process. The outbox leases, so the processes share the work, and what one of
them had in hand when it was killed is delivered by another.
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

MOST_UNDER_WAY: Final = 16
"""Calls under way in one process."""
LOOK_EVERY_S: Final = 0.25
GRACE_S: Final = 1.0
"""How long calls under way may take once the process was told to end."""
THREADS: Final = 4 * MOST_UNDER_WAY
"""For Redis and for names to be resolved; a resolver may hang for longer than a call may take."""

Deliver = Callable[[Lease], Awaitable[None]]


class Dispatcher:
    """Hands out leases until it is told to end."""

    def __init__(self, outbox: Outbox, deliver: Deliver) -> None:
        self._outbox = outbox
        self._deliver = deliver

    def run(self, ending: threading.Event) -> None:
        """Work until `ending` is set. A Redis error ends the run, after the calls under way."""
        asyncio.run(self._run(ending))

    async def _run(self, ending: threading.Event) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "webhooks"))
        under_way: dict[asyncio.Task[None], Lease] = {}
        try:
            while not ending.is_set():
                if room := MOST_UNDER_WAY - len(under_way):
                    for lease in await asyncio.to_thread(self._outbox.take, room):
                        under_way[asyncio.create_task(self._guarded(lease))] = lease
                await asyncio.sleep(LOOK_EVERY_S)
                for task in [each for each in under_way if each.done()]:
                    del under_way[task]
        except RedisError:
            if under_way:
                await asyncio.wait(under_way)
            raise
        finally:
            await self._end(under_way)

    async def _end(self, under_way: dict[asyncio.Task[None], Lease]) -> None:
        """Give the calls under way a moment, and give back what is not done then."""
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
                # Then the lease runs out by itself.
                return

    async def _guarded(self, lease: Lease) -> None:
        try:
            await self._deliver(lease)
        except RedisError as error:
            # The lease runs out by itself, and then it is tried again.
            logger.warning("the webhook of job %s is left for later: %s", lease.job_id, error)
