"""Send systemd what it asks for of a service or worker that it runs (sd_notify).

The protocol is a word in a datagram. Who gives the signs of life is for the processes to choose:
`service/monitoring/systemd.py`, `worker/process/systemd.py`.
"""

import logging
import os
import socket
from typing import Final

logger = logging.getLogger(__name__)

SIGNS: Final = 3
"""Signs of life in the time that systemd waits for one."""


class SystemdSocket:
    """Where systemd listens; silent if it did not start this process with `Type=notify`.

    Attributes:
        every_s: how often to give a sign of life; None if the unit has no `WatchdogSec`, or means
            another process (WATCHDOG_USEC, WATCHDOG_PID).
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        limit_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        meant_for = os.environ.get("WATCHDOG_PID") or str(os.getpid())
        is_watched = limit_us > 0 and meant_for == str(os.getpid())
        self.every_s = limit_us / 1e6 / SIGNS if is_watched else None

    def send(self, state: str) -> None:
        """Send a state; one that cannot be sent at once costs a line in the log."""
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):  # an abstract socket
            address = f"\0{address[1:]}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)  # an event loop may be what sends
                sender.sendto(state.encode(), address)
        except OSError as error:
            logger.warning("systemd is not told %s: %s", state, error)
