"""Test that wheel and sdist have all files of the packages, and make a video away from here."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.deploy.wheel_install import (
    PACKAGES,
    ROOT,
    build_sdist,
    build_wheel,
    install_beside,
    make_video,
    outside,
    packaged_files,
    unpack_sdist,
)

DEVELOPMENT = ("service/pages/tsconfig.json", "service/pages/types/")
"""What only `make lint` reads."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_beside(wheel, tmp_path_factory.mktemp("installed") / "environment")


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {name for name in sources if not name.startswith(DEVELOPMENT)}
    packed = packaged_files(wheel)
    assert expected - packed == set(), "list it in [tool.setuptools.package-data]"
    assert packed - expected == set()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_makes_a_video_away_from_the_repository(
    programs: Path, redis_url: str, tmp_path: Path
) -> None:
    code = "import jobs, service, worker, quant, mini; print(jobs.__path__, mini.__path__)"
    found = subprocess.run(
        [programs / "python", "-c", code],
        cwd=tmp_path,
        env=outside(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count(str(programs.parent)) == 2, found.stdout

    job, video = make_video(programs, tmp_path / "run", redis_url)
    assert job["state"] == "succeeded", job["failure"]
    assert hashlib.sha256(video).hexdigest() == job["video"]["sha256"]


@pytest.mark.slow
def test_the_toolkit_is_installed_as_a_program(programs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [programs / "wan-quant", "codes", "--help"],
        cwd=tmp_path,
        env=outside(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sdist_makes_the_same_wheel_and_a_video(
    wheel: Path, redis_url: str, tmp_path: Path
) -> None:
    sdist = build_sdist(tmp_path)
    unpacked = unpack_sdist(sdist, tmp_path)
    (tmp_path / "wheel").mkdir()
    assert packaged_files(build_wheel(tmp_path / "wheel", unpacked)) == packaged_files(wheel)

    programs = install_beside(sdist, tmp_path / "environment")
    job, video = make_video(programs, tmp_path / "run", redis_url)
    assert job["state"] == "succeeded", job["failure"]
    assert hashlib.sha256(video).hexdigest() == job["video"]["sha256"]
