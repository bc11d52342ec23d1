"""Retry storing a video: it took minutes to make, so a short fault must not lose it."""

import logging
import time
from collections.abc import Callable
from itertools import count
from typing import Final

from redis.backoff import EqualJitterBackoff

from jobs.errors import ArtifactNotStored, WorkerUnfit

logger = logging.getLogger(__name__)

RETRY_FOR_S: Final = 30.0
"""No try starts later than this after the first."""

_BACKOFF: Final = EqualJitterBackoff(cap=5.0, base=0.1)
"""0.2 s after the first fault, then twice as long each time; up to half of it is taken off at
random, because all workers of a store see its faults at the same time."""

_CHECK_EVERY_S: Final = 0.5


class PutFailed(Exception):
    """One try failed, and left nothing visible.

    `reason` is for the caller, so it names no hosts and no paths; the cause does, for the log.
    `transient` faults may go away by themselves, so they are worth a retry. `missing`: what is
    there is not the store that other processes use, which is this worker's fault, not the store's.
    """

    def __init__(self, reason: str, *, transient: bool, missing: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.transient = transient
        self.missing = missing


def put_with_retries(
    put_once: Callable[[], None],
    check: Callable[[], None] | None,
    guard: Callable[[], None] | None,
    retry_for_s: float,
) -> None:
    """Call `put_once` until it succeeds, fails for good, or `retry_for_s` have passed.

    `guard` is called before each try, and may fail it with PutFailed. `check` is called while
    waiting; an error it raises (a cancel) ends the waiting.

    Raises:
        ArtifactNotStored: with the last fault's reason.
        WorkerUnfit: the last fault was that the store is missing.
    """
    deadline = time.monotonic() + retry_for_s
    for failures in count(1):
        pause_s = _BACKOFF.compute(failures)
        try:
            if guard is not None:
                guard()
            return put_once()
        except PutFailed as fault:
            logger.warning("could not store a file: %s: %s", fault.reason, fault.__cause__)
            if not fault.transient or time.monotonic() + pause_s > deadline:
                if fault.missing:
                    raise WorkerUnfit(
                        f"The video was made, and this worker has nowhere to store it: "
                        f"{fault.reason}. Mount its share, or correct its ARTIFACTS_URL."
                    ) from fault
                raise ArtifactNotStored(
                    f"The video was made but could not be stored: {fault.reason}. Once that is "
                    f"mended, the same request with the same seed makes it again."
                ) from fault
        _wait(pause_s, check)


def _wait(seconds: float, check: Callable[[], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if check is not None:
            check()
        time.sleep(min(left, _CHECK_EVERY_S))
