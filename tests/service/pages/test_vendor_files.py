"""Test that the libraries of others are what their makers published, with licence and version."""

import gzip
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VENDOR = ROOT / "service" / "pages" / "static" / "vendor"
LIBRARIES = sorted(path for path in VENDOR.iterdir() if path.is_dir())

PROGRAM = """
from setuptools import Distribution
distribution = Distribution()
distribution.parse_config_files()
command = distribution.get_command_obj("build_py")
command.finalize_options()
command.manifest_files = {}  # or setuptools writes a manifest into the source tree
print("\\n".join(command.find_data_files("service", "service")))
"""


def content(path: Path) -> bytes:
    """Read a file of a library; large ones are kept gzipped."""
    if path.exists():
        return path.read_bytes()
    return gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


def test_there_are_libraries() -> None:
    assert LIBRARIES


@pytest.mark.parametrize("folder", LIBRARIES, ids=lambda folder: folder.name)
def test_every_file_has_the_sum_that_is_written_beside_it(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    present = {path.name.removesuffix(".gz") for path in folder.iterdir()} - {"SHA256SUMS"}
    assert set(sums) == present
    for name, digest in sums.items():
        assert hashlib.sha256(content(folder / name)).hexdigest() == digest, name


@pytest.mark.parametrize("folder", LIBRARIES, ids=lambda folder: folder.name)
def test_a_library_says_its_version_and_its_licence(folder: Path) -> None:
    assert re.fullmatch(r"[a-z-]+-\d+\.\d+\.\d+", folder.name)
    readme = (VENDOR / "README.md").read_text(encoding="utf-8")
    name, _, version = folder.name.rpartition("-")
    assert re.search(rf"\| `{folder.name}` \| `{name}[a-z-]*@{re.escape(version)}` \|", readme)
    assert version in readme
    assert len(content(folder / "LICENSE.txt")) > 1000


def test_a_package_holds_all_files_of_the_pages() -> None:
    """What setuptools would put into a wheel, without building one."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    pages = ROOT / "service" / "pages"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("static", "templates")
        for path in (pages / folder).rglob("*")
        if path.is_file()
    }
    packed = {line for line in done.stdout.splitlines() if line.startswith("service/pages/")}
    assert packed == wanted
