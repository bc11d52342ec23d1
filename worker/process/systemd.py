"""Tell systemd that the worker serves and is alive, where its unit asks for it.

A thread of its own gives the sign of life, not the heartbeat: that waits for Redis, and a worker
that does so must not be ended. It shows that threads of this process still run; whether the job in
hand goes on is for `worker/job/watchdog.py` to say.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from jobs.telemetry.systemd import SystemdSocket
from worker.process.background import BackgroundThread

JOIN_TIMEOUT_S = 1.0


class SystemdNotifier(BackgroundThread):
    """A context manager: ready when it is entered, alive inside, stopping when it is left.

    It does nothing if systemd did not start this process with `Type=notify`. With `WatchdogSec` it
    gives three signs of life in that time.
    """

    def __init__(self) -> None:
        super().__init__("systemd", JOIN_TIMEOUT_S)
        self._systemd = SystemdSocket()

    def __enter__(self) -> Self:
        self._systemd.send("READY=1")
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._systemd.send("STOPPING=1")
        super().__exit__(kind, error, trace)

    def _run(self) -> None:
        every_s = self._systemd.every_s
        while every_s is not None and not self._done.wait(every_s):
            self._systemd.send("WATCHDOG=1")
