"""Tell systemd that the worker serves and is alive, where its unit asks for it (sd_notify).

A thread of its own gives the sign of life, not the heartbeat: that waits for Redis, and a worker
that does so must not be ended. It shows that threads of this process still run; whether the job in
hand goes on is for `worker/job/watchdog.py` to say.
"""

from __future__ import annotations

import logging
import os
import socket
from types import TracebackType
from typing import Self

from worker.process.background import BackgroundThread

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 1.0


class SystemdNotifier(BackgroundThread):
    """A context manager: ready when it is entered, alive inside, stopping when it is left.

    It does nothing if systemd did not start this process with `Type=notify`. With `WatchdogSec`
    (WATCHDOG_USEC) it gives three signs of life in that time.
    """

    def __init__(self) -> None:
        super().__init__("systemd", JOIN_TIMEOUT_S)
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        limit_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        meant_for = os.environ.get("WATCHDOG_PID") or str(os.getpid())
        is_watched = limit_us > 0 and meant_for == str(os.getpid())
        self._every_s = limit_us / 3e6 if is_watched else None

    def __enter__(self) -> Self:
        self._notify("READY=1")
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._notify("STOPPING=1")
        super().__exit__(kind, error, trace)

    def _run(self) -> None:
        while self._every_s is not None and not self._done.wait(self._every_s):
            self._notify("WATCHDOG=1")

    def _notify(self, state: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):  # an abstract socket
            address = f"\0{address[1:]}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), address)
        except OSError as error:
            logger.warning("systemd is not told %s: %s", state, error)
