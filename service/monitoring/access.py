"""Decide who may read the metrics, also while Redis is down.

Only keys of the role ops may, and sessions of such keys. Keys are in Redis, so while it is down the
reader that was admitted last by a key is admitted again. Otherwise nobody could read the metric
that says that Redis is down.
"""

import hashlib
import hmac
import time
from typing import Final

from service.auth.gate import Credential, Gate, require_ops
from service.auth.sessions import SessionToken

READER_CACHED_S: Final = 3600.0
"""How long after its last success a reader is admitted without Redis; after that it is refused."""


class MetricsAccess:
    """Checks readers of the metrics, and remembers the last one that was admitted.

    One is enough, because one Prometheus server reads them over and over. It uses a key: a person
    who looks with a session does not take its place.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._last: tuple[float, bytes] | None = None  # when it expires, and the token's digest

    def admit(self, credential: Credential) -> None:
        """Admit a reader by its key or session, as Redis knows it.

        Raises:
            Unauthenticated, Forbidden, RateLimited: see `Gate.admit` and `require_ops`.
            RedisError: the key or session cannot be checked.
        """
        require_ops(self._gate.admit(credential))
        if not isinstance(credential, SessionToken):
            self._last = (time.monotonic() + READER_CACHED_S, _digest(credential))

    def knows(self, credential: Credential) -> bool:
        """Return whether this is the reader that was admitted last, within `READER_CACHED_S`.

        Does not read Redis. A reader without a key is never known, unless the service may be open.
        """
        if isinstance(credential, SessionToken):
            return False
        if credential is None and self._gate.is_locked:
            return False
        last = self._last
        if last is None or time.monotonic() > last[0]:
            return False
        return hmac.compare_digest(_digest(credential), last[1])


def _digest(token: str | None) -> bytes:
    return hashlib.sha256((token or "").encode()).digest()
