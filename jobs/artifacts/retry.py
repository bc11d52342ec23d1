"""Patience with a store that fails: a video took minutes to make, so it is not lost to a blip."""

import logging
import random
import time
from collections.abc import Callable, Iterator

from jobs.errors import ArtifactNotStored

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""No try begins later than this after the first."""

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_CHECK_EVERY_S = 0.5


class PutFault(Exception):
    """One try failed, and left nothing visible.

    `reason` is for the caller, so it names no hosts and no paths; the cause has them for the log.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass


def keep_trying(
    put_once: Callable[[], None], check: Callable[[], None] | None, patience_s: float
) -> None:
    """Call `put_once` until it succeeds, its fault is there to stay, or patience runs out.

    `check` is called while waiting; what it raises (a cancel) ends the waiting.

    Raises:
        ArtifactNotStored: with the last fault's reason.
    """
    deadline = time.monotonic() + patience_s
    for pause_s in _pauses():
        try:
            return put_once()
        except PutFault as fault:
            logger.warning("could not store a video: %s: %s", fault.reason, fault.__cause__)
            if not fault.may_pass or time.monotonic() + pause_s > deadline:
                raise ArtifactNotStored(
                    f"The video was made but could not be stored: {fault.reason}. Once that is "
                    f"mended, the same request with the same seed makes it again."
                ) from fault
        _wait(pause_s, check)


def _pauses() -> Iterator[float]:
    """Double each time, with jitter: all workers of a store notice its faults at once."""
    longest_s = _FIRST_PAUSE_S
    while True:
        yield random.uniform(longest_s / 2, longest_s)
        longest_s = min(2 * longest_s, _LONGEST_PAUSE_S)


def _wait(seconds: float, check: Callable[[], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if check is not None:
            check()
        time.sleep(min(left, _CHECK_EVERY_S))
