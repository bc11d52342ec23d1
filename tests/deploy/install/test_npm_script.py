"""Test that deploy/install/npm.sh installs what is locked, and nothing else, by the venv's npm."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "deploy" / "install" / "npm.sh"
LOCKED = ROOT / "requirements" / "npm"


def run(venv: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), str(venv)], capture_output=True, text=True, check=False
    )


def venv_with_npm(tmp_path: Path, script: str) -> Path:
    npm = tmp_path / "venv with spaces" / "bin" / "npm"
    npm.parent.mkdir(parents=True)
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return npm.parent.parent


def test_npm_installs_from_the_lock_file_and_runs_no_scripts(tmp_path: Path) -> None:
    venv = venv_with_npm(tmp_path, 'pwd; echo "npm $*"')
    done = run(venv)
    assert done.returncode == 0, done.stderr
    folder, command = done.stdout.splitlines()
    assert folder == str(venv / "npm")
    assert command.startswith("npm ci --ignore-scripts")
    for name in ("package.json", "package-lock.json"):
        assert (venv / "npm" / name).read_bytes() == (LOCKED / name).read_bytes()


def test_a_failure_is_told(tmp_path: Path) -> None:
    done = run(venv_with_npm(tmp_path, "exit 1"))
    assert done.returncode == 1
    assert "error: npm could not install what checks the pages" in done.stderr


def test_an_environment_without_the_development_tools_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "has no npm, which comes with the development tools: make install" in done.stderr


def test_everything_that_is_locked_has_a_digest() -> None:
    asked = json.loads((LOCKED / "package.json").read_text("utf-8"))["devDependencies"]
    locked = json.loads((LOCKED / "package-lock.json").read_text("utf-8"))["packages"]
    assert all(version[0].isdigit() for version in asked.values()), "exact versions only"
    assert {f"node_modules/{name}": version for name, version in asked.items()}.items() <= {
        name: each.get("version") for name, each in locked.items()
    }.items()
    assert all(each["integrity"].startswith("sha512-") for name, each in locked.items() if name)
