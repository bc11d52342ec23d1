"""Tell systemd that the service answers and is alive, where its unit asks for it (sd_notify).

The event loop itself gives the signs of life: one that hangs gives none, and systemd restarts the
process. The worker has a notifier of its own (`worker/process/systemd.py`): the two share nothing
but the protocol, which is a word in a datagram.
"""

import logging
import os
import socket
import time

logger = logging.getLogger(__name__)


class SystemdNotifier:
    """Sends what systemd is to know; nothing if it did not start this process with `Type=notify`.

    With `WatchdogSec` (WATCHDOG_USEC) `alive` sends three signs of life in that time, however often
    it is called.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        limit_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        meant_for = os.environ.get("WATCHDOG_PID") or str(os.getpid())
        is_watched = limit_us > 0 and meant_for == str(os.getpid())
        self._every_s = limit_us / 3e6 if is_watched else None
        self._due = 0.0

    def ready(self) -> None:
        """Say that requests are answered from now on."""
        self._notify("READY=1")

    def alive(self) -> None:
        """Give a sign of life if one is due."""
        now = time.monotonic()
        if self._every_s is not None and now >= self._due:
            self._due = now + self._every_s
            self._notify("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the process is about to end."""
        self._notify("STOPPING=1")

    def _notify(self, state: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):  # an abstract socket
            address = f"\0{address[1:]}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), address)
        except OSError as error:
            logger.warning("systemd is not told %s: %s", state, error)
