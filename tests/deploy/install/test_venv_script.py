"""Test deploy/install/venv.sh with fakes of python3 and apt-get, on incomplete machines."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "install" / "venv.sh"

# A Debian python3: 3.11, without ensurepip until the package is installed.
DEBIAN_PYTHON = """#!/bin/sh
case "$*" in
  *"import ensurepip"*) test -e {installed} ;;
  *"print("*) echo 3.11 ;;
  "-m venv"*) mkdir -p "$4" ;;
  *) exit 0 ;;
esac
"""
APT_GET = """#!/bin/sh
echo "apt-get $*"
case "$*" in *install*) touch {installed} ;; esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the executables in tmp_path/bin first on PATH."""
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), python, str(tmp_path / "venv")],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_venv_package_is_installed_with_apt(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    installed = tmp_path / "installed"
    executable(tmp_path / "bin" / "debian-python", DEBIAN_PYTHON.format(installed=installed))
    executable(tmp_path / "bin" / "apt-get", APT_GET.format(installed=installed))
    executable(tmp_path / "bin" / "id", "#!/bin/sh\necho 0")
    done = run(tmp_path, "debian-python")
    assert done.returncode == 0, done.stderr
    assert "install -q -y --no-install-recommends python3.11-venv" in done.stdout
    assert (tmp_path / "venv").is_dir()


def test_without_root_or_sudo_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    missing = tmp_path / "never"
    executable(tmp_path / "bin" / "debian-python", DEBIAN_PYTHON.format(installed=missing))
    executable(tmp_path / "bin" / "apt-get", "#!/bin/sh\nexit 1")
    executable(tmp_path / "bin" / "id", "#!/bin/sh\necho 1000")
    executable(tmp_path / "bin" / "sudo", "#!/bin/sh\nexit 1")
    done = run(tmp_path, "debian-python")
    assert done.returncode == 1
    assert done.stderr == (
        "error: debian-python cannot make virtual environments: "
        "install the packages python3.11-venv (apt-get update failed)\n"
    )


def test_an_old_python_is_refused_with_its_version(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    old = '#!/bin/sh\ncase "$*" in *"print("*) echo 3.9 ;; *) exit 1 ;; esac'
    executable(tmp_path / "bin" / "old-python", old)
    done = run(tmp_path, "old-python")
    assert done.returncode == 1
    assert done.stderr.startswith("error: old-python is Python 3.9 and 3.11 or newer is needed")
    assert len(done.stderr.splitlines()) == 1


def test_no_python_at_all_is_one_clear_line(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such-python")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no-such-python was not found")
    assert len(done.stderr.splitlines()) == 1


def test_an_environment_that_works_is_kept(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    executable(tmp_path / "venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"')
    (tmp_path / "venv" / "marker").touch()
    assert run(tmp_path, sys.executable).returncode == 0
    assert (tmp_path / "venv" / "marker").exists()
