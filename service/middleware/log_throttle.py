"""Bound how often the same line is logged, where callers can cause it without an answered request.

Python logs each connection that it cannot accept, and uvicorn each request that it cannot parse.
Who opens thousands of connections must not fill the disk with them.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 10
EVERY_S: Final = 10.0
"""Of lines that begin alike, MOST are logged in EVERY_S seconds."""
NOISY: Final = ("asyncio", "uvicorn.error")


class LogThrottle(logging.Filter):
    """Drops what is too much, and says with the next line how much that was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        # By the first line, before values are filled in: since when it is counted, and how often.
        self._counted: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is logged."""
        kind = str(record.msg).partition("\n")[0][:200]
        now = self._clock()
        with self._lock:
            since, count = self._counted.get(kind, (now, 0))
            dropped = 0
            if now - since >= EVERY_S:
                dropped = max(0, count - MOST)
                since, count = now, 0
            self._counted[kind] = (since, count + 1)
        if dropped:
            record.msg = f"{record.msg} ({dropped} more like this were not logged)"
        return count < MOST


def throttle_noisy_loggers() -> None:
    """Bound what the event loop and the HTTP server log."""
    for name in NOISY:
        logging.getLogger(name).addFilter(LogThrottle())
