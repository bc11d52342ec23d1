"""A thread of its own beside what the worker does."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class BackgroundThread(ABC):
    """A context in which `_run` runs in a thread of its own.

    `_run` has to return soon after `_done` is set.
    """

    def __init__(self, name: str, end_wait_s: float | None = None) -> None:
        """end_wait_s: how long the end of the context waits for a thread that may hang in a Redis
        or a device; None for as long as it takes.
        """
        self._done = threading.Event()
        self._end_wait_s = end_wait_s
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(self._end_wait_s)

    @abstractmethod
    def _run(self) -> None: ...
