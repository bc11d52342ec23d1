"""Run a Valkey that can be killed and restarted from its append-only file, at the same address."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from redis import Redis

from deploy.local import valkey
from deploy.local.ports import LOOPBACK
from deploy.local.waiting import wait_until
from jobs.redis_client import connect


class KillableValkey:
    """A Valkey process that runs from its construction on."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        self.url = f"redis://{LOOPBACK}:{port}/0"
        self._command = valkey.server_command(folder, port)
        self._port = port
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(lambda: valkey.answers(self._port), 30, "Valkey answers")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_exit(self) -> None:
        self._process.wait(60)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def connect(self) -> Redis:
        return connect(self.url)
