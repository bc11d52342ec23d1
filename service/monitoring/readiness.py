"""Whether the service can do its work now, asked so that the answer comes soon.

A dead Redis keeps every other request waiting, and with them the threads of the pool; so this has
connections, patience and threads of its own.
"""

from typing import Final, NamedTuple

from anyio import CapacityLimiter, to_thread

from jobs import catalog
from jobs.redis_client import BRIEF, connect
from service.lookups.cached import CachedValue

THREADS: Final = 4


class LiveWorkers(NamedTuple):
    """How many there are, and how many of them run a mode slower than it was made for."""

    live: int
    degraded: int


class Readiness:
    """Asks Redis who is live. Raises RedisError where there is no quick answer."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url, BRIEF)
        # Not kept; but who asks while another asks shares its answer.
        self._catalog = CachedValue(lambda: catalog.read(self._redis), kept_s=0)
        self._limiter = CapacityLimiter(THREADS)

    async def workers(self) -> LiveWorkers:
        """Count them."""
        found = await to_thread.run_sync(self._catalog.get, limiter=self._limiter)
        return LiveWorkers(len(found.offers), sum(each.is_degraded for each in found.offers))

    def close(self) -> None:
        self._redis.close()
