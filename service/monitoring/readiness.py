"""Check quickly whether Redis answers and which workers are live.

While Redis is down every other request waits for it and holds a thread of the pool. So this check
has its own connections, with shorter time limits, and its own threads.
"""

from typing import Final, NamedTuple

from anyio import CapacityLimiter, to_thread

from jobs import catalog
from jobs.redis_client import BRIEF, connect
from jobs.store.workers import read_statuses
from service.lookups.cached import CachedValue

THREADS: Final = 4


class LiveWorkers(NamedTuple):
    """The workers that are live, and those that are worse than intended.

    Attributes:
        live: how many take jobs.
        degraded: how many run a mode slower than intended, or are out of service.
        faults: why workers are out of service, as sentences, each once.
    """

    live: int
    degraded: int
    faults: tuple[str, ...] = ()


class Readiness:
    """Counts the live workers. Raises RedisError if Redis does not answer quickly."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url, BRIEF)
        # Not cached, but concurrent callers share one read.
        self._workers = CachedValue(self._read, ttl_s=0)
        self._limiter = CapacityLimiter(THREADS)

    async def workers(self) -> LiveWorkers:
        """Count the live workers."""
        return await to_thread.run_sync(self._workers.get, limiter=self._limiter)

    def _read(self) -> LiveWorkers:
        offers = catalog.read(self._redis).offers
        statuses = read_statuses(self._redis)
        faults = [each.fault or "" for each in statuses if each.state == "degraded"]
        slow = sum(each.is_degraded for each in offers)
        return LiveWorkers(len(offers), slow + len(faults), tuple(sorted(set(faults))))

    def close(self) -> None:
        self._redis.close()
