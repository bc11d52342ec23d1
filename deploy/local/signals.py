"""Turn Ctrl-C, SIGTERM and SIGHUP into a flag that is checked at safe points.

If a handler raised, it could do so after a child was started and before it was stored, and the
child would never be stopped. So the handlers only count, and the loops of the stack check.

A terminal that closes counts as SIGHUP. The kernel sends SIGHUP only to the session leader; if that
is make (as in `ssh -t host make demo`), it waits for this process and forwards nothing.
"""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deploy.local.errors import Interrupted

_STDIN = 0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Counts the received signals: the first means to stop, the second to stop without waiting."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self._terminal = select.poll()
        if os.isatty(_STDIN):
            self._terminal.register(_STDIN, select.POLLHUP)

    def raise_if_interrupted(self) -> None:
        """Raise Interrupted if a signal has been received."""
        if not self.count and self._terminal.poll(0):
            self._handle(signal.SIGHUP, None)
        if self.count:
            raise Interrupted(self.last)

    def is_forced(self) -> bool:
        """Return whether a second signal has been received."""
        return self.count > 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = number


@contextmanager
def handle_signals() -> Iterator[Signals]:
    """Handle the signals during the `with` block. Main thread only."""
    signals = Signals()
    previous = {number: signal.signal(number, signals._handle) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
