"""Wait until a condition becomes true."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    limit_s: float = 20.0,
    what: str = "the condition holds",
    explain: Callable[[], str] = lambda: "",
    every_s: float = 0.02,
) -> float:
    """Poll `condition()` until it is true; return the seconds that took.

    Args:
        what: the condition as a sentence, for the error.
        explain: returns further lines for the error, such as the end of a log.

    Raises:
        TimeoutError: it was not true within `limit_s`.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit_s:
            raise TimeoutError(f"not within {limit_s:g} s: {what}\n{explain()}".rstrip())
        time.sleep(every_s)
    return time.monotonic() - started
