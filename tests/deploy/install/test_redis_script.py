"""Test that deploy/install/redis.sh puts a Redis server into the environment."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "install" / "redis.sh"
SERVER = 'echo "$0 $*"'


def run(tmp_path: Path, installs: str = "", *programs: str) -> subprocess.CompletedProcess[str]:
    """Run the script as root where PATH has those programs; apt-get installs another."""
    folder, environment = tmp_path / "bin", tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    folder.mkdir()
    for name in ("chmod", "dirname", "env", "ln", "sh"):
        (folder / name).symlink_to(shutil.which(name) or name)
    install = f"echo '#!/bin/sh\n{SERVER}' >{folder}/{installs}; chmod 755 {folder}/{installs}"
    for name, text in [
        ("id", "echo 0"),
        ("apt-get", f'echo "apt-get $*"\n{install if installs else ""}'),
        *((name, SERVER) for name in programs),
    ]:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), str(environment)],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["redis-server", "redis-check-rdb"])
def test_a_server_that_is_there_is_linked_and_nothing_installed(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, "", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "venv/bin/redis-server").readlink() == tmp_path / "bin" / name


def test_debians_tools_are_installed_where_there_is_none(tmp_path: Path) -> None:
    done = run(tmp_path, "redis-check-rdb")
    assert done.returncode == 0, done.stderr
    assert "install -q -y --no-install-recommends redis-tools" in done.stdout
    assert (tmp_path / "venv/bin/redis-server").readlink() == tmp_path / "bin/redis-check-rdb"


def test_tools_without_a_server_are_said(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "redis-tools is installed, and there is no redis-check-rdb in PATH" in done.stderr
