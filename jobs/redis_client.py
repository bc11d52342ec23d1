"""Connect to Redis with timeouts and one quick retry.

A call to a dead server fails after about ten seconds instead of blocking a request forever. A
command that a server refuses because it has become a replica is sent once more over a new
connection, which reaches the new primary where the address points to it. Repeating a call is safe:
every script in `jobs/store/scripts.py` recognises a repeated call by its token or its id.
"""

from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ReadOnlyError
from redis.retry import Retry

HEALTH_CHECK_S = 30


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


DEFAULT: Final = Limits(connect_s=2.0, response_s=5.0, retries=1)
BRIEF: Final = Limits(connect_s=0.5, response_s=1.0, retries=0)
"""For calls such as health checks, whose response is useless when it is late."""


def connect(url: str, limits: Limits = DEFAULT) -> Redis:
    """Return a client for `url`; nothing is sent until the first command.

    Responses are bytes, as RQ requires. The client is safe to share between threads.
    """
    return Redis.from_url(
        url,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), limits.retries),
        retry_on_error=[ReadOnlyError],
        health_check_interval=HEALTH_CHECK_S,
        **limits.timeouts,
    )


def connect_async(url: str, max_connections: int) -> redis.asyncio.Redis:
    """Return an asynchronous client for `url` with a pool of connections and no retries.

    A call waits while all connections of the pool are in use. Nothing is retried, because a broken
    subscription has missed messages: its owner must see the error.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=DEFAULT.response_s,
        retry=AsyncRetry(NoBackoff(), 0),
        **DEFAULT.timeouts,
    )
    return redis.asyncio.Redis.from_pool(pool)
