"""Tell the refusals of Redis that end by themselves from those that do not, and explain the latter.

`is_transient` is the one place that tells "not now" from "never". redis-py turns some codes of the
server into classes, and strips them from the text; others it leaves in the text, behind the number
of the command if a pipeline sent it.
"""

import re
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    InvalidResponse,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

_FOR_NOW_CLASSES: Final = (
    RedisConnectionError,  # also LOADING, and too many clients
    RedisTimeoutError,
    InvalidResponse,
    ClusterDownError,  # also MASTERDOWN
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)

_FOR_NOW: Final = frozenset(
    {
        "BUSY",  # a script of somebody else runs for long
        "CLUSTERDOWN",
        "LOADING",  # it reads its data at its start
        "MASTERDOWN",  # a replica without its primary
        "MISCONF",  # it cannot write to its disk
        "NOREPLICAS",  # it has too few replicas to accept a write
        "NOSCRIPT",  # it was restarted just now, or its scripts were flushed
        "OOM",  # its memory is full
        "READONLY",  # it has become a replica
        "TRYAGAIN",  # the keys are being moved
        "UNBLOCKED",  # it became a replica while the command waited
    }
)
"""Codes of refusals that end by themselves, or once an operator has acted on the server."""

_FOR_NOW_TEXTS: Final = ("Script killed by user", "max number of clients")
"""Such refusals whose code is only ERR."""

_IN_PIPELINE: Final = re.compile(r"^Command # \d+ \(.*?\) of pipeline caused error: ", re.DOTALL)
_WITHIN: Final = re.compile(r"(?:because of: |@user_script: ?\d+: )-?([A-Z]+) ")
"""Where the code of a command is that failed within a transaction, or, before Redis 7, a script."""

_REMEDIES: Final = {
    "NOAUTH": "Put the password of this Redis into REDIS_URL, and restart the process.",
    "WRONGPASS": "Put the right user and password into REDIS_URL, and restart the process.",
    "NOPERM": "Give the user in REDIS_URL all commands and all keys (ACL SETUSER).",
    "WRONGTYPE": "Something else writes to this database, or another version has: use one of its "
    "own.",
    "MOVED": "REDIS_URL names a sharded cluster: use a single server, with replicas if you like.",
}
_SAME_REMEDY: Final = {"ASK": "MOVED", "CROSSSLOT": "MOVED"}


def is_transient(error: RedisError) -> bool:
    """Return whether the same call may succeed later: Redis is away, or refuses it for now.

    A password or permission that Redis refuses is lasting, although redis-py's classes for the
    former are connection errors.
    """
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return False
    if isinstance(error, _FOR_NOW_CLASSES):
        return True
    return _code(error) in _FOR_NOW or any(text in str(error) for text in _FOR_NOW_TEXTS)


def explain(error: RedisError) -> str:
    """Say in two sentences what Redis refuses for good, and the remedy; names no values of ours."""
    code, text = _code(error), _IN_PIPELINE.sub("", str(error)).rstrip(".")
    if "ACL failure in script" in text:
        code = "NOPERM"
    remedy = _REMEDIES.get(_SAME_REMEDY.get(code, code), "Repeating the command would not help.")
    said = text if not code or text.startswith(code) else f"{code} {text}"
    return f"Redis refuses a command for good: {said}. {remedy}"


def _code(error: RedisError) -> str:
    """Return the code of a refusal, such as READONLY; an empty string if it has none."""
    text = _IN_PIPELINE.sub("", str(error))
    if (within := _WITHIN.search(text)) is not None:
        return within[1]
    code = error.status_code or text.partition(" ")[0]
    return code if code.isupper() else ""
