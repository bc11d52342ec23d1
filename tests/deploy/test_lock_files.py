"""Test that what is installed with hashes is what was tested: the versions of constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {
    "service": (),
    "worker": ("worker", "cuda"),
    "worker-without-torch": ("worker",),
    "tracing": ("tracing",),
}
BESIDE = {"tracing"}
"""Files that are installed together with another, which has what the project itself needs."""
# From another index: its files have other hashes (docker/install-torch.sh).
LEFT_OUT = {"worker-without-torch": {"torch"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(path: Path) -> dict[str, str]:
    """The versions in a file of requirements, by name."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.M)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("name", EXTRAS)
def test_every_version_is_the_tested_one(name: str) -> None:
    tested, locked = pinned(ROOT / "constraints.txt"), pinned(ROOT / "requirements" / f"{name}.txt")
    assert {each: locked[each] for each in locked.keys() & tested} == {
        each: tested[each] for each in locked.keys() & tested
    }
    # What torch brings for GPUs is not in constraints.txt; what we ask for ourselves is.
    assert len(locked.keys() & tested) > 0.6 * len(locked)


@pytest.mark.parametrize("name", EXTRAS)
def test_everything_that_is_needed_is_locked(name: str) -> None:
    needed = [] if name in BESIDE else list(PROJECT["dependencies"])
    for extra in EXTRAS[name]:
        needed += PROJECT["optional-dependencies"][extra]
    locked = pinned(ROOT / "requirements" / f"{name}.txt")
    for requirement in map(Requirement, needed):
        if requirement.name in LEFT_OUT.get(name, ()):
            assert requirement.name not in locked
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing; renew the file as it says"
        assert requirement.specifier.contains(version), requirement


@pytest.mark.parametrize("name", [each for each in EXTRAS if each not in BESIDE])
def test_what_is_installed_together_asks_for_the_same(name: str) -> None:
    """pip refuses two versions of one package; images install both files at once."""
    traces = pinned(ROOT / "requirements" / "tracing.txt")
    others = pinned(ROOT / "requirements" / f"{name}.txt")
    both = traces.keys() & others.keys()
    assert "opentelemetry-api" in both
    assert {each: traces[each] for each in both} == {each: others[each] for each in both}


def test_a_worker_without_torch_has_nothing_for_gpus() -> None:
    locked = pinned(ROOT / "requirements" / "worker-without-torch.txt")
    assert not {each for each in locked if each.startswith(("nvidia-", "cuda-", "triton"))}
    everything = pinned(ROOT / "requirements" / "worker.txt")
    assert {each: everything[each] for each in locked} == locked


def test_the_checks_of_manifests_have_hashes_of_what_is_asked_for() -> None:
    asked = pinned(ROOT / "requirements" / "deploy-checks.in")
    locked = pinned(ROOT / "requirements" / "deploy-checks.txt")
    assert asked.items() <= locked.items()


@pytest.mark.parametrize("name", [*EXTRAS, "deploy-checks"])
def test_everything_has_hashes(name: str) -> None:
    """pip refuses a file in which one requirement has none, if others have some."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert len(entries) == len(pinned(ROOT / "requirements" / f"{name}.txt"))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def documented_commands() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    pages += [*(ROOT / "docs").rglob("*.md"), ROOT / "deploy" / "wan-14b.toml"]
    return [
        (page.name, line.strip())
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        # Of this project; others' packages are named.
        if re.search(r"(pip install|PIP\)).* '?\.(\[|'|\s|$)", line)
    ]


def test_every_documented_command_installs_the_tested_versions() -> None:
    commands = documented_commands()
    assert len(commands) >= 4
    for page, line in commands:
        assert "-c constraints.txt" in line or "--no-deps" in line, f"{page}: {line}"
