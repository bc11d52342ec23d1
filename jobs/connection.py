"""Open Redis with time limits and a few quick retries.

A call that meets a dead server gives up after about ten seconds instead of hanging a request for
ever. What may be repeated safely is repeated here: the scripts in `jobs/scripts.py` recognise a
repeated call by its token, and `JobStore.create` opts out because a repeated enqueue would run a
job twice.
"""

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
RETRIES = 3
HEALTH_CHECK_S = 30


def connect(url: str) -> Redis:
    """Return a client for `url`; nothing is sent until the first command.

    Answers are bytes, because RQ needs them so. The client is safe to share between threads.
    """
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES),
        health_check_interval=HEALTH_CHECK_S,
    )
