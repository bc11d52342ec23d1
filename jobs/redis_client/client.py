"""Connect to Redis with timeouts and one quick retry, at one address or through sentinels.

A call to a dead server fails after about ten seconds instead of blocking a request forever. A
command that a server refuses because it has become a replica is sent once more over a new
connection, which reaches the new primary: the address points to it, or the sentinels know it.
Repeating a call is safe: every script in `jobs/store/scripts.py` recognises a repeated call by its
token or its id.
"""

from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis import DriverInfo, Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ReadOnlyError
from redis.retry import Retry

from jobs.redis_client.address import parse_address
from jobs.redis_client.sentinel import AsyncSentinels, BlockingSentinelPool, Sentinels

HEALTH_CHECK_S = 30

SENTINEL_S: Final = 1.0
"""The longest wait for a connection to one sentinel, and for its answer."""


_DRIVER: Final = DriverInfo()
"""What connections say of redis-py: without it each reads the version from the package's files."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The timeouts of connections and responses, and the number of retries."""

    connect_s: float
    response_s: float
    retries: int

    @property
    def timeouts(self) -> dict[str, Any]:
        """The timeouts as keyword arguments of redis-py."""
        return {"socket_connect_timeout": self.connect_s, "socket_timeout": self.response_s}

    @property
    def of_sentinels(self) -> dict[str, Any]:
        """Keyword arguments for each sentinel: there are others to ask, so none is waited for long.

        Without them redis-py would try a dead one four times, over seconds.
        """
        return {
            "socket_connect_timeout": min(self.connect_s, SENTINEL_S),
            "socket_timeout": min(self.response_s, SENTINEL_S),
            "retry": Retry(NoBackoff(), 0),
        }


DEFAULT: Final = Limits(connect_s=2.0, response_s=5.0, retries=1)
BRIEF: Final = Limits(connect_s=0.5, response_s=1.0, retries=0)
"""For calls such as health checks, whose response is useless when it is late."""


def connect(url: str, limits: Limits = DEFAULT) -> Redis:
    """Return a client for `url`; nothing is sent until the first command.

    Responses are bytes, as RQ requires. The client is safe to share between threads.

    Raises:
        ValueError: `url` cannot be used (`parse_address`).
    """
    address = parse_address(url)
    options: dict[str, Any] = {
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), limits.retries),
        "retry_on_error": [ReadOnlyError],
        "health_check_interval": HEALTH_CHECK_S,
        "driver_info": _DRIVER,
        **limits.timeouts,
    }
    if not address.sentinels:
        return Redis.from_url(address.url, **options)
    sentinels = Sentinels(  # type: ignore[no-untyped-call]
        address.sentinels,
        sentinel_kwargs={**address.sentinel_options, **limits.of_sentinels},
        **address.server_options(),
    )
    client: Redis = sentinels.master_for(  # type: ignore[no-untyped-call]
        address.primary, **options
    )
    return client


def connect_async(url: str, max_connections: int) -> redis.asyncio.Redis:
    """Return an asynchronous client for `url` with a pool of connections and no retries.

    A call waits while all connections of the pool are in use. Nothing is retried, because a broken
    subscription has missed messages: its owner must see the error.

    Raises:
        ValueError: `url` cannot be used (`parse_address`).
    """
    address = parse_address(url)
    options: dict[str, Any] = {
        "max_connections": max_connections,
        "timeout": DEFAULT.response_s,
        "retry": AsyncRetry(NoBackoff(), 0),
        "driver_info": _DRIVER,
        **DEFAULT.timeouts,
    }
    if not address.sentinels:
        pool = redis.asyncio.BlockingConnectionPool.from_url(address.url, **options)
        return redis.asyncio.Redis.from_pool(pool)
    sentinels = AsyncSentinels(  # type: ignore[no-untyped-call]
        address.sentinels,
        sentinel_kwargs={
            **address.sentinel_options,
            **DEFAULT.of_sentinels,
            "retry": AsyncRetry(NoBackoff(), 0),
        },
        **address.server_options(),
    )
    client: redis.asyncio.Redis = sentinels.master_for(
        address.primary, connection_pool_class=BlockingSentinelPool, **options
    )
    return client


def server_time_s(redis: Redis) -> float:
    """Return Redis' time, by which hosts agree whose own clocks may be hours ahead."""
    second, microsecond = redis.time()
    return float(second + microsecond / 1e6)
