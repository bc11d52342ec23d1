"""Test Valkey's configuration for TLS, with Debian's Redis: the embedded Valkey has none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from deploy.local.waiting import wait_until
from jobs.redis_client import connect
from tests.deploy.manifests.manifest_files import DEPLOY
from tests.deploy.manifests.tools.installed_tools import tool

pytestmark = pytest.mark.deploy

PASSWORD = "0123456789abcdef"
SECRETS = {"authority": "authority.pem", "certificate": "valkey.pem", "key": "valkey.key"}


def moved(name: str, folder: Path, port: int) -> Path:
    """Copy a file of deploy/valkey with this test's places in it."""
    text = (DEPLOY / "valkey" / name).read_text(encoding="utf-8")
    for secret, file in SECRETS.items():
        text = text.replace(f"/run/secrets/valkey-{secret}", str(folder / "certificates" / file))
    for place in ("/run/valkey/", "/etc/valkey/"):
        text = text.replace(place, f"{folder}/")
    text = text.replace("dir /data", f"dir {folder}").replace("tls-port 6379", f"tls-port {port}")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_clients_that_know_the_authority_reach_it_and_no_others(
    tmp_path: Path, unused_port: int
) -> None:
    sh = shutil.which("sh") or ""
    script = DEPLOY / "valkey" / "certificates.sh"
    for folder in ("certificates", "others"):
        command = [sh, str(script), str(tmp_path / folder), "valkey", "localhost"]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "certificates" / "authority.key").stat().st_mode & 0o777 == 0o600
    for name in ("valkey.conf", "tls.conf", "start.sh"):
        moved(name, tmp_path, unused_port)
    # Under its own name it would check a file and end.
    (tmp_path / "valkey-server").symlink_to(tool("redis-check-rdb"))
    process = subprocess.Popen(
        [sh, tmp_path / "start.sh", tmp_path / "tls.conf"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "VALKEY_PASSWORD": PASSWORD},
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
    )

    def url(authority: str) -> str:
        known = tmp_path / authority / "authority.pem"
        return f"rediss://:{PASSWORD}@localhost:{unused_port}/0?ssl_ca_certs={known}"

    def answers() -> bool:
        assert process.poll() is None
        try:
            return bool(connect(url("certificates")).ping())
        except RedisConnectionError:
            return False

    try:
        wait_until(answers, 30, "Redis answers by TLS")
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            connect(url("others")).ping()
        with pytest.raises(RedisConnectionError):
            connect(f"redis://:{PASSWORD}@localhost:{unused_port}/0").ping()
    finally:
        process.kill()
        process.wait()
