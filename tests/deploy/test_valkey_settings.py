"""Test that the embedded Valkey loses no acknowledged write and has the documented settings."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis

from deploy.local import valkey
from deploy.local.waiting import wait_until

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


@contextmanager
def server(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(valkey.server_command(folder, port), stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: valkey.answers(port), 30, "Valkey answers")
        yield process
    finally:
        process.kill()
        process.wait()


def test_acknowledged_writes_survive_a_kill(tmp_path: Path, unused_port: int) -> None:
    with server(tmp_path, unused_port) as process, Redis(port=unused_port) as redis:
        for number in range(300):
            redis.rpush("acknowledged", number)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server(tmp_path, unused_port), Redis(port=unused_port) as redis:
        assert redis.llen("acknowledged") == 300


def test_it_has_the_settings_that_the_documentation_asks_for(
    tmp_path: Path, unused_port: int
) -> None:
    documented = dict(
        re.findall(r"^\| `([a-z-]+) ([a-z]+)` \|", OPERATIONS.read_text(encoding="utf-8"), re.M)
    )
    assert set(documented) == {"appendonly", "appendfsync", "maxmemory-policy"}
    with server(tmp_path, unused_port), Redis(port=unused_port, decode_responses=True) as redis:
        for name, value in documented.items():
            assert redis.config_get(name) == {name: value}
