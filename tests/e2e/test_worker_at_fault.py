"""Test two workers of which one cannot do its part: the other runs all jobs, and none fails.

The engine is a fake; services, queue, scratch folders and ffmpeg are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving.faulty_host import FaultyHost
from deploy.local.waiting import wait_until
from tests.e2e.two_workers import TwoWorkers
from worker.errors import EXIT_UNFIT

pytestmark = pytest.mark.slow


@pytest.fixture
def host(tmp_path: Path) -> FaultyHost:
    return FaultyHost(tmp_path / "host-0")


@pytest.fixture
def site(tmp_path: Path, host: FaultyHost) -> Iterator[TwoWorkers]:
    other = FaultyHost(tmp_path / "host-1")
    environments = {"worker-0": host.environment, "worker-1": other.environment}
    with TwoWorkers(tmp_path / "cluster", environments) as site:
        yield site


def test_no_job_fails_for_a_workers_fault_and_the_worker_comes_back(
    site: TwoWorkers, host: FaultyHost
) -> None:
    first = site.submit(20)
    site.wait_until_ended(first, least=4)
    assert host.remove_scratch() == 1
    site.wait_until_ended(first)
    returned = site.returned()
    assert returned == 1, "the removed folder cost one attempt"

    second = site.submit(20)
    site.wait_until_ended(second, least=4)
    host.break_ffmpeg()
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
    wait_until(lambda: "out of service" in site.log("worker-0"), 30, "the log says why")
    host.mend()
    site.cluster.wait_until_ready(60)
    site.wait_until_ended(site.submit(4))
    assert site.states()["degraded"] == 0


def test_a_worker_that_stays_at_fault_ends_with_its_own_status_and_takes_nothing(
    site: TwoWorkers, host: FaultyHost
) -> None:
    site.cluster.pause_restarts("worker-0")
    host.break_ffmpeg()
    jobs = site.submit(10)
    site.wait_until_ended(jobs)
    child = site.cluster.children["worker-0"]
    wait_until(lambda: child.exit_code is not None, 60, "it ends", site.cluster.logs)
    assert child.exit_code == EXIT_UNFIT
    assert site.returned() == 1
    site.check(jobs)
