"""Open Redis with time limits and a quick retry.

A call that meets a dead server gives up after about ten seconds instead of hanging a request for
ever. A server that has become a replica is asked once more over a new connection, which finds the
new primary where the address stands for it. What may be repeated safely is repeated here: every
script in `jobs/store/scripts.py` recognises a repeated call by its token or its id.
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
class Patience:
    """How long to wait for a connection and for an answer, and how often to try again."""

    connect_s: float
    answer_s: float
    retries: int

    @property
    def limits(self) -> dict[str, Any]:
        return {"socket_connect_timeout": self.connect_s, "socket_timeout": self.answer_s}


PATIENT: Final = Patience(connect_s=2.0, answer_s=5.0, retries=1)
BRIEF: Final = Patience(connect_s=0.5, answer_s=1.0, retries=0)
"""For questions whose answer is worth nothing when it is late."""


def connect(url: str, patience: Patience = PATIENT) -> Redis:
    """Return a client for `url`; nothing is sent until the first command.

    Answers are bytes, because RQ needs them so. The client is safe to share between threads.
    """
    return Redis.from_url(
        url,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), patience.retries),
        retry_on_error=[ReadOnlyError],
        health_check_interval=HEALTH_CHECK_S,
        **patience.limits,
    )


def connect_async(url: str, most_connections: int) -> redis.asyncio.Redis:
    """Return a client for `url` that shares some connections and tries nothing twice.

    Who is out of luck waits for one of the connections. A subscription that broke has missed
    messages, so its owner must learn of it instead of having it mended.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=most_connections,
        timeout=PATIENT.answer_s,
        retry=AsyncRetry(NoBackoff(), 0),
        **PATIENT.limits,
    )
    return redis.asyncio.Redis.from_pool(pool)
