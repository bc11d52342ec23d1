"""Ask sentinels for the primary, with redis-py's classes, and say why none is known.

redis-py's own search swaps entries of a list while other threads read it, which can drop a sentinel
for good, and it takes a refused password for an outage. Here each search looks at the list as it
is, and the sentinel that knew the primary comes first in the next.
"""

from __future__ import annotations

from typing import Any, cast

from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelPool
from redis.exceptions import RedisError
from redis.sentinel import MasterNotFoundError, Sentinel

from jobs.redis_client.refusals import is_transient

Address = tuple[str, int]


class Sentinels(Sentinel):
    """The sentinels of one address. Safe to share between threads."""

    sentinels: list[Redis]

    def discover_master(self, service_name: str) -> Address:
        """Return the host and port of the primary.

        Raises:
            MasterNotFoundError: a connection error; no sentinel knows one that is up.
            RedisError: all sentinels refuse to tell, for good.
        """
        search = _Search(service_name)
        asked = list(self.sentinels)
        for sentinel in asked:
            try:
                primaries = cast("dict[str, Any]", sentinel.sentinel_masters())
            except RedisError as error:
                search.note_failure(sentinel, error)
                continue
            finally:
                sentinel.connection_pool.disconnect(inuse_connections=False)
            if search.is_answered_by(sentinel, primaries, self.check_master_state):
                self.sentinels = [sentinel, *(each for each in asked if each is not sentinel)]
                return search.found
        raise search.failure()


class AsyncSentinels(AsyncSentinel):
    """The same for asyncio."""

    sentinels: list[AsyncRedis]

    async def discover_master(self, service_name: str) -> Address:
        """Return the host and port of the primary; raises as `Sentinels` does."""
        search = _Search(service_name)
        asked = list(self.sentinels)
        for sentinel in asked:
            try:
                primaries = await cast("Any", sentinel).sentinel_masters()
            except RedisError as error:
                search.note_failure(sentinel, error)
                continue
            finally:
                await sentinel.connection_pool.disconnect(inuse_connections=False)
            if search.is_answered_by(sentinel, primaries, self.check_master_state):
                self.sentinels = [sentinel, *(each for each in asked if each is not sentinel)]
                return search.found
        raise search.failure()


class BlockingSentinelPool(AsyncSentinelPool, BlockingConnectionPool):
    """A pool of connections to the primary, in which a call waits while all are in use."""


class _Search:
    """One search for a primary: what the sentinels have said so far."""

    def __init__(self, primary: str) -> None:
        self.found: Address = ("", 0)
        self._primary = primary
        self._said: list[str] = []
        self._refusals: list[RedisError] = []
        self._asked = 0

    def is_answered_by(self, sentinel: Any, primaries: dict[str, Any], is_up: Any) -> bool:
        """Return whether a sentinel knows a primary that is up; then it is in `found`."""
        self._asked += 1
        state = primaries.get(self._primary)
        if state is None:
            known = ", ".join(sorted(primaries)) or "none"
            self._said.append(f"{_place(sentinel)} does not know it (it knows {known})")
        elif not is_up(state, self._primary):
            self._said.append(f"{_place(sentinel)} sees it down")
        else:
            self.found = (str(state["ip"]), int(state["port"]))
            return True
        return False

    def note_failure(self, sentinel: Any, error: RedisError) -> None:
        """Note that a sentinel was not reached, or refused to tell."""
        self._asked += 1
        self._said.append(f"{_place(sentinel)}: {str(error).rstrip('.')}")
        if not is_transient(error):
            self._refusals.append(error)

    def failure(self) -> RedisError:
        """Build the error of a search that has found nothing."""
        said = "; ".join(self._said)
        if len(self._refusals) == self._asked:
            first = self._refusals[0]
            text = (
                f"{first}. No sentinel tells where the primary {self._primary} is: {said}. Put "
                f"what they want into sentinel_username and sentinel_password of REDIS_URL, and "
                f"let them run SENTINEL MASTERS"
            )
            return type(first)(text, status_code=first.status_code)
        return MasterNotFoundError(
            f"No sentinel knows a primary {self._primary} that is up: {said}. Wait for a "
            f"fail-over, or correct the name and the sentinels' addresses in REDIS_URL."
        )


def _place(sentinel: Any) -> str:
    """Return the host and port of a sentinel."""
    options = sentinel.connection_pool.connection_kwargs
    return f"{options['host']}:{options['port']}"
