"""Tell systemd that the service answers and is alive, where its unit asks for it.

The event loop itself gives the signs of life: one that hangs gives none, and systemd restarts the
process.
"""

import time

from jobs.telemetry.systemd import SystemdSocket


class SystemdNotifier:
    """Sends what systemd is to know; nothing if it did not start this process with `Type=notify`.

    With `WatchdogSec` `alive` sends three signs of life in that time, however often it is called.
    """

    def __init__(self) -> None:
        self._systemd = SystemdSocket()
        self._due = 0.0

    def ready(self) -> None:
        """Say that requests are answered from now on."""
        self._systemd.send("READY=1")

    def alive(self) -> None:
        """Give a sign of life if one is due."""
        now, every_s = time.monotonic(), self._systemd.every_s
        if every_s is not None and now >= self._due:
            self._due = now + every_s
            self._systemd.send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the process is about to end."""
        self._systemd.send("STOPPING=1")
