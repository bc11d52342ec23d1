"""Test that deploy/install/chromium.sh installs a browser only if there is none."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "install" / "chromium.sh"


def run(tmp_path: Path, *browsers: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as root where PATH has those browsers, apt-get and the basic tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "env", "sh"):
        (folder / name).symlink_to(shutil.which(name) or name)
    for name, text in [
        ("id", "echo 0"),
        ("apt-get", 'echo "apt-get $*"'),
        *((name, "") for name in browsers),
    ]:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT)],
        env={"PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome"])
def test_nothing_is_installed_where_there_is_a_browser(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_debians_browser_is_installed_where_there_is_none(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "install -q -y --no-install-recommends chromium fonts-dejavu-core" in done.stdout


def test_a_browser_that_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, CHROMIUM="/nowhere/chromium")
    assert done.returncode == 1
    assert "CHROMIUM is /nowhere/chromium, which is no executable file" in done.stderr
