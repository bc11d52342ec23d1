"""Test two workers of which one cannot do its part: the other runs all jobs, and none fails.

The engine is a fake; services, queue, scratch folders and ffmpeg are real.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.cluster import ENDED, Cluster
from deploy.local.waiting import wait_until
from tests.e2e.faulty_host import FaultyHost
from worker.errors import EXIT_UNFIT

STEP_S = "0.05"
BODY = {"prompt": "a small red circle", "num_inference_steps": 4}

pytestmark = pytest.mark.slow


class Site:
    """A cluster of two workers, the first of which has a host that can be broken."""

    def __init__(self, folder: Path) -> None:
        self.hosts = [FaultyHost(folder / f"host-{number}") for number in range(2)]
        self.cluster = Cluster(
            folder / "cluster",
            apis=1,
            worker=(sys.executable, "-m", "benchmarks.serving.fake_worker", STEP_S),
            environment={"SERVICE_MAX_WAITING": "100", "SERVICE_QUOTA": "100"},
            own_environments={
                f"worker-{number}": host.environment for number, host in enumerate(self.hosts)
            },
        )
        self._seeds = itertools.count()

    def submit(self, count: int) -> list[str]:
        return [self.cluster.submit(**BODY, seed=next(self._seeds)) for _ in range(count)]

    def ended(self, jobs: list[str]) -> int:
        return sum(self.cluster.job(each)["state"] in ENDED for each in jobs)

    def states(self) -> collections.Counter[str]:
        workers = self.cluster.request("GET", "/workers").json()["workers"]
        return collections.Counter(each["state"] for each in workers)

    def wait_until_ended(self, jobs: list[str]) -> None:
        done = lambda: self.ended(jobs) == len(jobs)  # noqa: E731
        wait_until(done, 120, "all jobs end", self.cluster.logs, every_s=0.5)

    def check(self, jobs: list[str]) -> collections.Counter[int]:
        """Check that each job ended once, with a whole video; return their numbers of attempts."""
        attempts: collections.Counter[int] = collections.Counter()
        for job_id in jobs:
            job = self.cluster.job(job_id)
            assert job["state"] == "succeeded", (job["failure"], self.cluster.logs())
            assert job["lost"] == 0
            assert self.cluster.end_states(job_id) == ["succeeded"]
            content = self.cluster.request("GET", f"/jobs/{job_id}/video.mp4").content
            assert hashlib.sha256(content).hexdigest() == job["video"]["sha256"]
            attempts[job["attempts"]] += 1
        return attempts

    def returned(self) -> int:
        """Return how many attempts the workers gave back for a fault of theirs."""
        metrics = self.cluster.request("GET", "/metrics").text.splitlines()
        found = [line for line in metrics if line.startswith("wan_attempts_returned_total{")]
        return int(sum(float(line.split()[-1]) for line in found))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    with site.cluster:
        yield site


def test_no_job_fails_for_a_workers_fault_and_the_worker_comes_back(site: Site) -> None:
    first, faulty = site.submit(20), site.hosts[0]
    wait_until(lambda: site.ended(first) >= 4, 60, "some jobs end", site.cluster.logs)
    assert faulty.remove_scratch() == 1
    site.wait_until_ended(first)
    returned = site.returned()
    assert returned == 1, "the removed folder cost one attempt"

    second = site.submit(20)
    wait_until(lambda: site.ended(second) >= 4, 60, "some jobs end", site.cluster.logs)
    faulty.break_ffmpeg()
    site.wait_until_ended(second)
    assert 1 <= site.returned() - returned <= 2, "it was taken out of service at once"
    attempts = site.check(first + second)
    again = sum((number - 1) * jobs for number, jobs in attempts.items())
    assert again == site.returned(), "each attempt that was given back was made again, once"

    fault = "ffmpeg ended with status 1: it said nothing."
    shown = {"status": "ready", "workers": 1, "degraded": 1, "faults": [fault]}
    request = site.cluster.request
    wait_until(lambda: request("GET", "/readyz").json() == shown, 30, "it is degraded")
    wait_until(lambda: site.states()["degraded"] == 1, 30, "it is degraded", site.cluster.logs)
    log = site.cluster.folder / "logs" / "worker-0.log"
    wait_until(lambda: "out of service" in log.read_text(encoding="utf-8"), 30, "the log says why")
    faulty.mend()
    site.cluster.wait_until_ready(60)
    site.wait_until_ended(site.submit(4))
    assert site.states()["degraded"] == 0


def test_a_worker_that_stays_at_fault_ends_with_its_own_status_and_takes_nothing(
    site: Site,
) -> None:
    site.cluster.pause_restarts("worker-0")
    site.hosts[0].break_ffmpeg()
    jobs = site.submit(10)
    site.wait_until_ended(jobs)
    child = site.cluster.children["worker-0"]
    wait_until(lambda: child.exit_code is not None, 60, "it ends", site.cluster.logs)
    assert child.exit_code == EXIT_UNFIT
    assert site.returned() == 1
    site.check(jobs)
