"""Cache a value for a short time and share each read of it among threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class CachedValue(Generic[Value]):
    """A value that is read again when it is older than `ttl_s`. Safe to share between threads.

    At most one thread reads at a time, and those that wait get its result. They get its error, too,
    so that they do not all try a Redis that is down, one after the other. Errors are not cached,
    and neither are values for which `worth_caching` returns False.
    """

    def __init__(
        self,
        read: Callable[[], Value],
        ttl_s: float,
        worth_caching: Callable[[Value], bool] = lambda _: True,
    ) -> None:
        self._read = read
        self._ttl_s = ttl_s
        self._worth_caching = worth_caching
        self._lock = threading.Lock()
        self._cached: tuple[float, Value] | None = None  # with the time at which it expires
        self._reading: Future[Value] | None = None

    def fresh(self) -> Value | None:
        """Return the cached value, or None if it must be read again; never blocks."""
        cached = self._cached
        return cached[1] if cached is not None and time.monotonic() < cached[0] else None

    def get(self) -> Value:
        """Return the value, and read it first if it is too old; raises what reading it raises."""
        with self._lock:
            value = self.fresh()
            if value is not None:
                return value
            reading = self._reading
            if reading is None:
                mine = self._reading = Future()
        if reading is not None:
            return reading.result()
        try:
            value = self._read()
            if self._worth_caching(value):
                self._cached = (time.monotonic() + self._ttl_s, value)
            mine.set_result(value)
            return value
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            self._reading = None
