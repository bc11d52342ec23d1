"""A value that is read again only when what was read is too old."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class CachedValue(Generic[Value]):
    """Reads a value for many threads: at most one of them reads, and the others get what it got.

    That goes for errors, too: a Redis that is away is not asked by each of them in turn. Errors are
    not remembered, and no value that is not `worth_keeping`.
    """

    def __init__(
        self,
        read: Callable[[], Value],
        kept_s: float,
        worth_keeping: Callable[[Value], bool] = lambda _: True,
    ) -> None:
        self._read = read
        self._kept_s = kept_s
        self._worth_keeping = worth_keeping
        self._lock = threading.Lock()
        self._kept: tuple[float, Value] | None = None
        self._reading: Future[Value] | None = None

    def fresh(self) -> Value | None:
        """The value if it need not be read again; takes no time."""
        kept = self._kept
        return kept[1] if kept is not None and time.monotonic() < kept[0] else None

    def get(self) -> Value:
        """The value, read now if it is too old; raises what reading it raises."""
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
            if self._worth_keeping(value):
                self._kept = (time.monotonic() + self._kept_s, value)
            mine.set_result(value)
            return value
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            self._reading = None
