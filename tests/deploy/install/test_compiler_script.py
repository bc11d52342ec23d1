"""Test that deploy/install/compiler.sh installs a compiler only if one is certainly needed."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "install" / "compiler.sh"

# A Python in which exactly the facts in FACTS are true.
PYTHON = """#!/bin/sh
has() { case " $FACTS " in *" $1 "*) ;; *) exit 1 ;; esac; }
case "$*" in
  *Python.h*) has headers ;;
  *find_spec*) has package ;;
  *"pip install"*) has network; has wheel ;;
  *"pip index versions"*) has network ;;
  *"print("*) echo 3.99 ;;
esac
"""


def run(tmp_path: Path, facts: str) -> subprocess.CompletedProcess[str]:
    """Run the script as root on a machine with a C++ compiler, apt-get and that Python."""
    executables = {
        "venv/bin/python": PYTHON,
        "bin/c++": "#!/bin/sh",
        "bin/id": "#!/bin/sh\necho 0",
        "bin/apt-get": '#!/bin/sh\necho "apt-get $*"',
    }
    for name, text in executables.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), str(tmp_path / "venv")],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FACTS": facts},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param("network wheel", id="there is a wheel"),
        pytest.param("network headers", id="it can be compiled"),
        pytest.param("network package", id="it is installed"),
        pytest.param("", id="no network, so nothing is known"),
        pytest.param("wheel", id="no network, though there would be a wheel"),
    ],
)
def test_nothing_is_installed_without_need(tmp_path: Path, facts: str) -> None:
    done = run(tmp_path, facts)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_compiler_is_installed_where_there_is_no_wheel(tmp_path: Path) -> None:
    done = run(tmp_path, "network")
    assert done.returncode == 0, done.stderr
    assert "install -q -y --no-install-recommends g++ python3.99-dev" in done.stdout
