"""Test that the Makefile passes any prompt unchanged, and lists its targets."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ODD = [
    """it's a "red" circle""",
    "costs $5, $HOME, ${HOME} and $$ signs",
    "$(shell touch PWNED) `touch PWNED` $(touch PWNED); touch PWNED",
    "back \\ slash # hash % percent = equals : colon",
    "ein grüner Kreis, 一个红色的圆",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment whose python only writes the prompt."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s" "$GENERATE_PROMPT" > prompt\n')
    python.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.venv", ".venv/.demo"):
        (tmp_path / name).touch()
    return tmp_path


def make(project: Path, *arguments: str, **environment: str) -> str:
    """Run make with a clean environment, also below `make test`; return its output."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["make", *arguments],
        cwd=project,
        env=clean | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize("prompt", ODD)
def test_a_prompt_given_to_make_arrives_unchanged(project: Path, prompt: str) -> None:
    make(project, "generate", f"PROMPT={prompt}")
    assert (project / "prompt").read_text(encoding="utf-8") == prompt
    assert not (project / "PWNED").exists()


@pytest.mark.parametrize("prompt", ODD)
def test_a_prompt_in_the_environment_arrives_unchanged(project: Path, prompt: str) -> None:
    make(project, "generate", PROMPT=prompt)
    assert (project / "prompt").read_text(encoding="utf-8") == prompt
    assert not (project / "PWNED").exists()


def test_help_lists_every_target(project: Path) -> None:
    targets = [line.split()[1] for line in make(project).splitlines()]
    assert targets == [
        "help",
        "install",
        "demo",
        "generate",
        "test",
        "test-all",
        "lint",
        "fuzz",
        "fix",
        "bench",
    ]
