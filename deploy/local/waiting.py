"""Wait until something is true that another thread or process brings about."""

import time
from collections.abc import Callable


def wait_until(
    holds: Callable[[], object],
    limit_s: float = 20.0,
    what: str = "the condition holds",
    explain: Callable[[], str] = lambda: "",
    every_s: float = 0.02,
) -> float:
    """Return after how many seconds `holds()` was first true.

    Args:
        what: the sentence that the error says has not come true.
        explain: gives further lines for the error, such as the end of a log.

    Raises:
        TimeoutError: it was not true within `limit_s`.
    """
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > limit_s:
            raise TimeoutError(f"not within {limit_s:g} s: {what}\n{explain()}".rstrip())
        time.sleep(every_s)
    return time.monotonic() - started
