"""Test that the Valkey of each manifest starts as documented, with a password that nobody sees."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from deploy.local import valkey
from deploy.local.waiting import wait_until
from tests.deploy.manifests.manifest_files import DEPLOY, ROOT, SYSTEMD

PASSWORD = "0123456789abcdef"
CONFIGURATIONS = [DEPLOY / "valkey" / "valkey.conf", SYSTEMD / "valkey.conf"]
START = DEPLOY / "valkey" / "start.sh"


def moved(text: str, folder: Path, port: int) -> str:
    """Put this test's places in: those of the manifests are of a container or of root."""
    for place in ("/run/valkey", "/etc/wan"):
        text = text.replace(f"{place}/", f"{folder}/")
    text = re.sub(r"^dir .*$", f"dir {folder}", text, flags=re.M)
    return re.sub(r"^port 6379$", f"port {port}", text, flags=re.M)


@contextmanager
def started(configuration: Path, folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    (folder / "valkey.conf").write_text(moved(configuration.read_text(), folder, port))
    (folder / "start.sh").write_text(moved(START.read_text(), folder, port))
    (folder / "valkey-server").symlink_to(valkey.server_command(folder, port)[0])
    if configuration.is_relative_to(SYSTEMD):
        # The unit starts the server itself; the operator has written the password's file.
        (folder / "valkey-password.conf").write_text(f"requirepass {PASSWORD}\n")
        command = [str(folder / "valkey-server"), str(folder / "valkey.conf")]
    else:
        command = [shutil.which("sh") or "", str(folder / "start.sh"), str(folder / "valkey.conf")]
    path = f"{folder}:{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        env={"PATH": path, "VALKEY_PASSWORD": PASSWORD},
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        wait_until(lambda: valkey.answers(port, PASSWORD), 30, "Valkey answers")
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.parent.name)
def test_it_starts_as_documented(configuration: Path, tmp_path: Path, unused_port: int) -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^\| `([a-z-]+) ([a-z]+)` \|", operations, re.M))
    assert len(asked) == 3
    with started(configuration, tmp_path, unused_port) as process:
        with Redis(port=unused_port) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        with Redis(port=unused_port, password=PASSWORD, decode_responses=True) as user:
            for name, value in (asked | {"save": ""}).items():
                assert user.config_get(name) == {name: value}
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert PASSWORD.encode() not in words, "everybody on the machine can read that"
        assert (tmp_path / "appendonlydir").is_dir()


def test_it_does_not_start_without_a_password(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["/bin/sh", START, "unused"], env={}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert "VALKEY_PASSWORD is empty" in answer.stderr
