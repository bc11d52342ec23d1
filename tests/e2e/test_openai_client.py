"""Test the official `openai` package, current and 2.8.0, against a real service and worker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until
from jobs import redis_keys
from service.auth.api_keys import KeyStore, Role
from tests.support.launcher import describe_video

OLDER = Path(sys.prefix) / "openai-2.8.0"
ENGINE = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0.02")


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A service without keys, on loopback."""
    folder = tmp_path_factory.mktemp("open")
    with Cluster(folder, apis=1, workers=1, worker=ENGINE) as site:
        yield site


@pytest.fixture(scope="module")
def keyed_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two service processes that require keys."""
    folder = tmp_path_factory.mktemp("keyed")
    with Cluster(folder, apis=2, workers=1, worker=ENGINE) as site:
        KeyStore(site.redis).add("somebody", Role.OPS)
        yield site


def run_session(site: Cluster, key: str, version: str, folder: Path) -> None:
    path = [str(ROOT)]
    if version == "2.8.0":
        command = "make .venv/.openai-2.8.0"
        assert (OLDER / "openai").is_dir(), f"openai 2.8.0 is not installed; run `{command}`"
        path.insert(0, str(OLDER))
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.openai_session", site.urls[-1], key, version, folder],
        cwd=folder,
        # The current client warns that its videos are deprecated. Sora is, but not this API.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{site.logs()}"
    assert (folder / "video.mp4").read_bytes() == (folder / "again.mp4").read_bytes()
    stream, frames = describe_video(folder / "video.mp4")
    assert frames == 5
    assert "h264" in stream
    assert "64x32" in stream
    for name, size in (("thumbnail", "64x32"), ("spritesheet", "192x64")):
        stream, pictures = describe_video(folder / f"{name}.webp")
        assert pictures == 1
        assert "webp" in stream
        assert f" {size}" in stream


@pytest.mark.parametrize("version", ["3.54.0", "2.8.0"])
def test_a_service_without_keys(open_site: Cluster, tmp_path: Path, version: str) -> None:
    run_session(open_site, "none", version, tmp_path)
    what_was_deleted_is_gone_for_good(open_site)


@pytest.mark.parametrize("version", ["3.54.0", "2.8.0"])
def test_a_service_with_keys(keyed_site: Cluster, tmp_path: Path, version: str) -> None:
    _, token = KeyStore(keyed_site.redis).add(f"user-{version[0]}", Role.USER)
    run_session(keyed_site, token, version, tmp_path)


def what_was_deleted_is_gone_for_good(site: Cluster) -> None:
    """Check deleted jobs, also the one that was running: its record and video are deleted, too."""
    wait_until(
        lambda: not site.redis.zcard(redis_keys.DELETIONS), 60, "deletions are done", site.logs
    )
    records = site.redis.scan_iter(f"{redis_keys.RECORD_PREFIX}*")
    named = {key.decode().removeprefix(redis_keys.RECORD_PREFIX) for key in records}
    stored = {path.parent.name for path in site.artifacts.rglob("*.mp4")}
    assert stored < named, "the failed job has no video, and no video is without its job"
    assert not any(
        site.redis.hexists(redis_keys.record(name), "delete_requested") for name in named
    )
