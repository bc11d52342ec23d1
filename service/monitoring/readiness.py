"""Check quickly whether Redis answers and which workers are live.

While Redis is down every other request waits for it and holds a thread of the pool. So this check
has its own connections, with shorter time limits, and its own threads.
"""

from typing import Final, NamedTuple

from anyio import CapacityLimiter, to_thread

from jobs import catalog
from jobs.redis_client import BRIEF, connect
from service.lookups.cached import CachedValue

THREADS: Final = 4


class LiveWorkers(NamedTuple):
    """The number of live workers, and of those with a mode that is slower than intended."""

    live: int
    degraded: int


class Readiness:
    """Counts the live workers. Raises RedisError if Redis does not answer quickly."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url, BRIEF)
        # Not cached, but concurrent callers share one read.
        self._catalog = CachedValue(lambda: catalog.read(self._redis), ttl_s=0)
        self._limiter = CapacityLimiter(THREADS)

    async def workers(self) -> LiveWorkers:
        """Count the live workers."""
        found = await to_thread.run_sync(self._catalog.get, limiter=self._limiter)
        return LiveWorkers(len(found.offers), sum(each.is_degraded for each in found.offers))

    def close(self) -> None:
        self._redis.close()
