"""Ctrl-C, SIGTERM and SIGHUP as a flag that is read at safe points.

A signal that raised wherever it happened to fall could fall between starting a child and
remembering it. So the handlers only count, and the loops of the stack ask.

A terminal that goes away counts as SIGHUP. The kernel signals only the leader of the session, and
where that is make (`ssh -t host make demo`), it waits for us and passes nothing on.
"""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deploy.local.errors import Interrupted

_STDIN = 0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Counts the requests to end. The second one means: without waiting for anybody."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self._terminal = select.poll()
        if os.isatty(_STDIN):
            self._terminal.register(_STDIN, select.POLLHUP)

    def raise_if_asked(self) -> None:
        """Raises Interrupted once a request to end has arrived."""
        if not self.count and self._terminal.poll(0):
            self._handle(signal.SIGHUP, None)
        if self.count:
            raise Interrupted(self.last)

    def in_a_hurry(self) -> bool:
        """Whether a second request has come."""
        return self.count > 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = number


@contextmanager
def listen_for_signals() -> Iterator[Signals]:
    """Turns the ending signals into a flag for the time of the block. Main thread only."""
    signals = Signals()
    before = {number: signal.signal(number, signals._handle) for number in _ENDING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
