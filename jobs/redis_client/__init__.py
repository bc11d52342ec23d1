"""The only way to Redis: connect by REDIS_URL, and say which errors may go away.

What is imported from here is public; the modules are not imported from outside.
"""

from jobs.redis_client.address import parse_address
from jobs.redis_client.client import (
    BRIEF,
    HEALTH_CHECK_S,
    Limits,
    connect,
    connect_async,
    server_time_s,
)
from jobs.redis_client.refusals import explain, is_transient

__all__ = [
    "BRIEF",
    "HEALTH_CHECK_S",
    "Limits",
    "connect",
    "connect_async",
    "explain",
    "is_transient",
    "parse_address",
    "server_time_s",
]
