"""Test that the embedded Valkey loses no acknowledged write and has the documented settings."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from deploy.local import valkey
from deploy.local.child_process import Child
from deploy.local.stack import StackConfig
from deploy.local.waiting import wait_until

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


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


def test_only_its_user_can_use_it(tmp_path: Path, unused_port: int) -> None:
    """Other users of the machine reach loopback, and see every command line."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    (folder / "of-an-earlier-version").touch(mode=0o644)
    config = StackConfig(tmp_path, 0, unused_port, tmp_path / "worker.toml")
    assert config.password not in repr(config)
    assert len(config.password) >= 32
    assert config.password != StackConfig(tmp_path, 0, unused_port, tmp_path / "w").password
    command = valkey.server_command(folder, unused_port, config.password)
    valkey.make_private(folder)
    assert config.password not in " ".join(command)
    log = tmp_path / "valkey.log"
    child = Child("valkey", command, log=log, cwd=tmp_path, env={}, umask=valkey.UMASK)
    try:
        wait_until(lambda: valkey.answers(unused_port, config.password), 30, "Valkey answers")
        with Redis(port=unused_port) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        with Redis.from_url(config.redis_url) as user:  # as `make demo` prints it
            assert user.ping()
            user.set("a", "b")
    finally:
        child.stop(5, lambda: False)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "appendonlydir")} == {0o700}
