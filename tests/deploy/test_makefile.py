"""Test that the Makefile passes any prompt unchanged, and lists its targets."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from deploy.local.cli import app

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
    """A folder with the Makefile and a python that only writes the prompt and its environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s" "$GENERATE_PROMPT" > prompt\nenv > environment\n')
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


@pytest.mark.parametrize("text", ODD)
def test_a_negative_prompt_arrives_unchanged(project: Path, text: str) -> None:
    make(project, "generate", f"NEGATIVE={text}")
    written = (project / "environment").read_text(encoding="utf-8")
    assert f"GENERATE_NEGATIVE={text}\n" in written
    assert not (project / "PWNED").exists()


OPTIONS = ("PROMPT", "MODE", "SIZE", "FRAMES", "STEPS", "SEED", "GUIDANCE", "NEGATIVE", "OUT")


def test_make_generate_takes_every_option_and_help_names_it(project: Path) -> None:
    make(project, "generate", *(f"{name}=a-{name}" for name in OPTIONS))
    written = (project / "environment").read_text(encoding="utf-8").splitlines()
    assert {f"GENERATE_{name}=a-{name}" for name in OPTIONS} <= set(written)
    (line,) = (line for line in make(project).splitlines() if "make generate" in line)
    assert all(f"{name}=" in line for name in OPTIONS)
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    read = {option.envvar for option in command.params}
    assert {f"GENERATE_{name}" for name in OPTIONS} <= read


def test_make_demo_passes_settings_on(project: Path) -> None:
    make(project, "demo", "PORT=8001", "SERVICE_WEBHOOK_HOSTS=a.example", WORKER_THREADS="1")
    written = (project / "environment").read_text(encoding="utf-8").splitlines()
    assert {"DEMO_PORT=8001", "SERVICE_WEBHOOK_HOSTS=a.example", "WORKER_THREADS=1"} <= set(written)


def test_help_lists_every_target(project: Path) -> None:
    targets = [line.split()[1] for line in make(project).splitlines()]
    assert targets == [
        "help",
        "install",
        "demo",
        "generate",
        "test",
        "test-all",
        "test-npu",
        "test-ray",
        "check-deploy",
        "lint",
        "fuzz",
        "fix",
        "bench",
        "check-wheel",
        "screenshots",
        "film",
        "images",
        "sbom",
        "locks",
    ]
