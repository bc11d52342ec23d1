"""Who may read the metrics: ops, and for a while those who were ops when Redis went away.

Keys are in Redis. If nobody could read metrics without it, the one that says that Redis is away
would never be seen.
"""

import hashlib
import hmac
import time
from typing import Final

from service.auth.gate import Gate, require_ops

REMEMBERED_S: Final = 3600.0
"""How long after its last success a reader is let in without Redis; after that it is refused."""


class MetricsAccess:
    """Remembers the last reader that was let in: one scrapes, again and again."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._last: tuple[float, bytes] | None = None

    def admit(self, token: str | None) -> None:
        """Let ops in.

        Raises:
            Unauthenticated, Forbidden, RateLimited: see `Gate.admit` and `require_ops`.
            RedisError: Redis cannot be asked.
        """
        require_ops(self._gate.admit(token))
        self._last = (time.monotonic() + REMEMBERED_S, _digest(token))

    def knows(self, token: str | None) -> bool:
        """Whether it is the reader that was let in last, not too long ago. Does not ask Redis.

        Who shows no key is nobody, unless the service is open.
        """
        if token is None and self._gate.is_locked:
            return False
        last = self._last
        if last is None or time.monotonic() > last[0]:
            return False
        return hmac.compare_digest(_digest(token), last[1])


def _digest(token: str | None) -> bytes:
    return hashlib.sha256((token or "").encode()).digest()
