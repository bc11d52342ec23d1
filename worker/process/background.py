"""Run code in a background thread for the length of a context."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class BackgroundThread(ABC):
    """A context manager that runs `_run` in a daemon thread.

    `_run` must return soon after `_done` is set.
    """

    def __init__(self, name: str, join_timeout_s: float | None = None) -> None:
        """Prepare the thread.

        Args:
            join_timeout_s: how long the exit of the context waits for the thread, which may hang in
                a call to Redis or to a device; None waits until it ends.
        """
        self._done = threading.Event()
        self._join_timeout_s = join_timeout_s
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
        self._thread.join(self._join_timeout_s)

    @abstractmethod
    def _run(self) -> None: ...
