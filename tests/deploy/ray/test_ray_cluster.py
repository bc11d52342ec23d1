"""Test the launcher on a real Ray cluster with a real worker (make test-ray)."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.deploy.ray.process_tree import descendants_of, is_gone, parent_of
from tests.support.requests import generation_request
from tests.support.worker_processes import has_ended, wait_for

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[3]
START = """
import sys, ray
ray.init(num_cpus=4, resources={"card": 3}, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


class RayCluster:
    """A cluster of one node on this machine, and the launcher's commands against it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.environment = {
            **os.environ,
            "REDIS_URL": redis_url,
            "ARTIFACTS_URL": (folder / "artifacts").as_uri(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home
            "WORKER_THREADS": "1",
            "TMPDIR": str(folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", START],
            env={**self.environment, "TMPDIR": "/tmp"},  # Ray's sockets need short paths
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.environment["RAY_ADDRESS"] = self._process.stdout.readline().strip()

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.ray", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("status", "--json"))
        return found

    def stop(self) -> None:
        self._process.communicate(timeout=60)  # the end of its input ends it, and Ray with it


@pytest.fixture
def cluster(redis_url: str, tmp_path: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(redis_url, tmp_path)
    yield cluster
    cluster.stop()


def test_up_restart_and_down(cluster: RayCluster, redis: Redis) -> None:
    store = JobStore(redis)
    up = ["up", "--device", "cpu", "--resource", "card", "--workers", "1"]
    assert "started 1, kept 0" in cluster.run(*up, "--wait-s", "120")
    assert "started 0, kept 1" in cluster.run(*up)
    queue = run_a_job(redis, store)

    (before,) = cluster.status()
    assert any("ready:" in line for line in before["lines"])
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        (now,) = cluster.status()
        return now["state"] == "ready" and now["pid"] != before["pid"]

    wait_until(is_back, 120, "Ray has started the worker again", every_s=1)
    (after,) = cluster.status()
    assert [each["how"] for each in after["ends"]] == ["was killed by SIGKILL"]
    assert run_a_job(redis, store) == queue

    ended = cluster.run("down", "--grace-s", "60")
    assert ended.startswith("worker-0: ended;")
    assert "ended with status 0" in ended
    assert cluster.status() == []
    assert not catalog.read(redis).offers


def test_two_ranks_are_one_worker_with_reserved_cards(cluster: RayCluster, redis: Redis) -> None:
    gang = ["up", "--device", "cpu", "--resource", "card", "--cards", "2", "--cpus", "2"]
    cluster.environment["GLOO_SOCKET_IFNAME"] = "lo"
    cluster.run(*gang, "--workers", "1", "--env", "GLOO_SOCKET_IFNAME", "--wait-s", "120")
    (offer,) = catalog.read(redis).offers
    assert offer.device.startswith("2 x ")
    run_a_job(redis, JobStore(redis))
    leave_no_rank_behind(cluster)
    single = ["up", "--device", "cpu", "--resource", "card", "--cards", "2"]
    cluster.run(*single, "--workers", "2")  # two more cards than there are
    assert [each["state"] for each in cluster.status()] == ["ready", "waiting"]
    ended = cluster.run("down", "--grace-s", "60")
    assert "worker-0: ended;" in ended
    assert "worker-1: waiting;" in ended
    assert cluster.status() == []


def run_a_job(redis: Redis, store: JobStore) -> str:
    (offer,) = catalog.read(redis).offers
    request = generation_request(num_frames=5, num_inference_steps=2, model=offer.model.name)
    job = store.create(request, offer.queue).job
    wait_for(store, job.id, has_ended, 120)
    assert store.get(job.id).state is JobState.SUCCEEDED
    return offer.queue


def leave_no_rank_behind(cluster: RayCluster) -> None:
    """Kill the actor of a gang: Ray starts another on the cards, and no old rank is left there."""
    (before,) = cluster.status()
    ranks = descendants_of(before["pid"])
    assert len(ranks) >= 2
    os.kill(parent_of(before["pid"]), signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, ranks)), 10)

    def is_back() -> bool:
        (now,) = cluster.status()
        return now["state"] == "ready" and now["pid"] != before["pid"]

    wait_until(is_back, 120, "Ray has started the worker again", every_s=1)


def test_a_worker_whose_actor_is_silent_ends_its_job_first(cluster: RayCluster) -> None:
    cluster.run(*["up", "--device", "cpu", "--resource", "card"], "--workers=1", "--wait-s=120")
    (before,) = cluster.status()
    actor = parent_of(before["pid"])
    os.kill(actor, signal.SIGSTOP)
    # Later than `status`, and than `down` has asked for the state, which takes 10 s each.
    back = threading.Timer(35, os.kill, (actor, signal.SIGCONT))
    back.start()
    try:
        (silent,) = cluster.status()
        assert silent["state"] == "silent"
        assert "ended with status 0" in cluster.run("down", "--grace-s", "60")
    finally:
        back.cancel()
        with suppress(ProcessLookupError):
            os.kill(actor, signal.SIGCONT)
