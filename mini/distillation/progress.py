"""Say how far a run is and how long the rest will take, in passes of the transformer."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_EVERY_S = 20.0


class Progress:
    """Counts passes of one sample, and logs a line from time to time."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._measured = total, 0, 0
        self._began = self._told = time.monotonic()

    def skip(self, passes: int) -> None:
        """Count passes that an earlier run has made; they say nothing about speed."""
        self._done += passes

    def advance(self, what: str, passes: int) -> None:
        """Count passes that were just made."""
        self._done += passes
        self._measured += passes
        now = time.monotonic()
        if now - self._told < _EVERY_S and self._done < self._total:
            return
        self._told = now
        left_s = (now - self._began) / self._measured * (self._total - self._done)
        logger.info(
            "%s: %.0f %% of all, about %.1f min left",
            what,
            100 * self._done / self._total,
            left_s / 60,
        )
