"""Wait for what comes about in other threads and processes."""

import time
from collections.abc import Callable


def until(true: Callable[[], object], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
