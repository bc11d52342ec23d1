"""Test that a service under systemd says when it answers, that it is alive, and when it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from service.settings import ServiceSettings
from tests.support.http_service import address


def test_it_tells_systemd_from_its_start_to_its_end(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env={
                **os.environ,
                "REDIS_URL": settings.redis_url.get_secret_value(),
                "ARTIFACTS_URL": settings.artifacts_url,
                "SERVICE_PORT": "0",
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "600000",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = address(process)
            assert told.recv(100) == b"READY=1"
            assert httpx.get(f"{url}/healthz").status_code == 200, "it is ready when it says so"
            assert [told.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3

            # An event loop that hangs gives no sign of life.
            process.send_signal(signal.SIGSTOP)
            told.settimeout(0.7)
            silent = 0
            try:
                while silent < 5:
                    told.recv(100)
                    silent += 1
            except TimeoutError:
                pass
            assert silent <= 1
            process.send_signal(signal.SIGCONT)
            told.settimeout(20)
            assert told.recv(100) == b"WATCHDOG=1"

            process.terminate()
            last = told.recv(100)
            while last == b"WATCHDOG=1":
                last = told.recv(100)
            assert last == b"STOPPING=1"
            process.communicate(timeout=20)
        finally:
            process.kill()
            process.communicate()
