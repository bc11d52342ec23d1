"""Test real faults: processes killed and stopped, a full disk, a device that fails or hangs.

Two API processes, two workers with the shipped miniature and one Valkey with its append-only file
run, and are restarted when they end. After every fault each accepted job ends exactly once, a
finished video is complete, and the service recovers by itself. The last test checks this for all
jobs together.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.local.cluster import ENDED, Cluster
from deploy.local.waiting import wait_until
from tests.support.launcher import describe_video

RECOVERED_S = 30
"""A job whose worker is gone runs again within so many seconds."""

DISK_BYTES = 4 * 1024 * 1024  # for the videos of all tests
LONG = {
    "prompt": "a large blue square moving up on a white background",
    "num_frames": 17,
    "num_inference_steps": 12,
    "seed": 3,
}
SHORT = {"prompt": "a small red circle", "num_frames": 5, "num_inference_steps": 2, "seed": 5}

pytestmark = pytest.mark.slow

needs_mount = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="only root can mount the small disk; tests/jobs fills one without, for the store alone",
)


class Site:
    """The cluster, a way to make its device fail, and the ids of all jobs that were accepted."""

    def __init__(self, cluster: Cluster, faults: Path) -> None:
        self.cluster = cluster
        self.accepted: list[str] = []
        self._faults = faults

    def submit(self, **body: object) -> str:
        job_id = self.cluster.submit(**body)
        self.accepted.append(job_id)
        return job_id

    def arm(self, fault: str, times: int) -> None:
        """Make the device fail at the end of its next steps: `oom`, `hang` or `die`."""
        for number in range(times):
            (self._faults / f"{fault}-{number}").touch()

    def armed(self) -> int:
        return len(list(self._faults.iterdir()))

    def disarm(self) -> None:
        for each in self._faults.iterdir():
            each.unlink(missing_ok=True)

    def wait_until_back(self, job_id: str, attempts: int) -> float:
        """Wait until an attempt after the `attempts`-th runs or has ended; return the seconds."""
        return wait_until(
            lambda: self.cluster.job(job_id)["attempts"] > attempts,
            RECOVERED_S,
            f"job {job_id} is run again",
            self.cluster.logs,
        )

    def succeeded(self, job_id: str) -> dict[str, Any]:
        """Wait until the job has succeeded, fetch its video, and check that it is complete."""
        job = self.cluster.wait_for_end(job_id)
        assert job["state"] == "succeeded", (job["failure"], self.cluster.logs())
        assert self.cluster.end_states(job_id) == ["succeeded"]
        path = self.cluster.folder / f"{job_id}.mp4"
        answer = self.cluster.request("GET", f"/jobs/{job_id}/video.mp4")
        assert answer.status_code == 200
        path.write_bytes(answer.content)
        assert hashlib.sha256(answer.content).hexdigest() == job["video"]["sha256"]
        stream, frames = describe_video(path)
        assert "h264" in stream
        assert frames == job["video"]["num_frames"] == job["request"]["num_frames"]
        return job


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("faults")
    faults = folder / "device-faults"
    faults.mkdir()
    disk = folder / "artifacts"
    disk.mkdir()
    if os.geteuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
    cluster = Cluster(
        folder,
        worker=(sys.executable, "-m", "tests.support.faulty_worker", str(faults)),
        environment={
            "WORKER_STALL_FLOOR_S": "5",
            "WORKER_FIRST_STEP_S": "15",
            "SERVICE_MAX_WAITING": "50",
        },
    )
    try:
        with cluster:
            site = Site(cluster, faults)
            # Both workers run a job first, so that they have measured a step.
            for job_id in [site.submit(**SHORT) for _ in range(4)]:
                site.succeeded(job_id)
            yield site
        assert cluster.orphans() == {}
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_worker_killed_in_the_middle_of_a_job(site: Site) -> None:
    job_id = site.submit(**LONG)
    worker = site.cluster.wait_for_step(job_id, 3)
    site.cluster.kill(worker)
    site.wait_until_back(job_id, attempts=1)
    job = site.succeeded(job_id)
    assert (job["attempts"], job["lost"]) == (2, 1)


def test_all_workers_killed_at_once(site: Site) -> None:
    """No worker is left to recover the jobs; those that are started in their place do."""
    jobs = [site.submit(**LONG) for _ in range(2)]
    for job_id in jobs:
        site.cluster.wait_for_step(job_id, 1)
    for worker in site.cluster.pids("worker"):
        site.cluster.kill(worker)
    for job_id in jobs:
        site.wait_until_back(job_id, attempts=1)
    for job_id in jobs:
        assert site.succeeded(job_id)["attempts"] == 2


def test_both_api_processes_killed(site: Site) -> None:
    job_id = site.submit(**LONG)
    site.cluster.wait_for_step(job_id, 1)
    for api in site.cluster.pids("api"):
        site.cluster.kill(api)
    waiting = site.submit(**SHORT)  # goes on asking until one is back
    assert site.succeeded(job_id)["attempts"] == 1
    assert site.succeeded(waiting)["attempts"] == 1
    site.cluster.wait_until_ready(RECOVERED_S)


def test_valkey_killed_and_started_from_its_file(site: Site) -> None:
    """The running job goes on, and jobs that were accepted just before are not lost."""
    running = site.submit(**LONG)
    site.cluster.wait_for_step(running, 2)
    workers = site.cluster.pids("worker")
    accepted = [site.submit(**SHORT) for _ in range(10)]
    site.cluster.kill("valkey")
    assert site.succeeded(running)["attempts"] == 1
    for job_id in accepted:
        assert site.succeeded(job_id)["attempts"] == 1
    assert site.cluster.pids("worker") == workers, "no worker had to load its model again"


def test_stopped_worker_is_replaced_and_does_no_harm_when_it_wakes(site: Site) -> None:
    job_id = site.submit(**LONG)
    worker = site.cluster.wait_for_step(job_id, 3)
    site.cluster.kill(worker, signal.SIGSTOP)
    try:
        site.wait_until_back(job_id, attempts=1)
        other = site.cluster.wait_for_step(job_id, 1)
        assert other != worker
    finally:
        site.cluster.kill(worker, signal.SIGCONT)
    job = site.succeeded(job_id)
    assert (job["attempts"], job["lost"]) == (2, 1)
    assert len(re.findall(r"/2-[0-9a-f]+\.mp4", site.cluster.record(job_id)["video"])) == 1
    site.cluster.wait_until_ready(RECOVERED_S)


def fill(path: Path) -> None:
    """Fill the small disk."""
    path.write_bytes(bytes(shutil.disk_usage(path.parent).free))
    assert shutil.disk_usage(path.parent).free == 0


@needs_mount
def test_full_disk_fails_the_job_and_leaves_nothing_half_written(site: Site) -> None:
    filler = site.cluster.artifacts / "filler"
    fill(filler)
    before = {path for path in site.cluster.artifacts.rglob("*") if path.is_file()}
    job_id = site.submit(**SHORT)
    job = site.cluster.wait_for_end(job_id)
    assert job["state"] == "failed"
    assert job["failure"]["code"] == "artifact_not_stored"
    assert "full" in job["failure"]["detail"]
    assert {path for path in site.cluster.artifacts.rglob("*") if path.is_file()} == before
    filler.unlink()
    site.succeeded(site.submit(**SHORT))


@needs_mount
def test_disk_that_is_full_for_a_moment_costs_nothing(site: Site) -> None:
    filler = site.cluster.artifacts / "filler"
    fill(filler)
    threading.Timer(8, filler.unlink).start()
    assert site.succeeded(site.submit(**SHORT))["attempts"] == 1


def test_out_of_memory_fails_the_job_and_not_the_worker(site: Site) -> None:
    workers = site.cluster.pids("worker")
    site.arm("oom", times=1)
    job = site.cluster.wait_for_end(site.submit(**SHORT))
    assert (job["state"], job["attempts"]) == ("failed", 1)
    assert job["failure"]["code"] == "out_of_device_memory"
    for job_id in [site.submit(**SHORT) for _ in range(4)]:
        site.succeeded(job_id)
    assert site.cluster.pids("worker") == workers


def test_out_of_memory_twice_in_a_row_ends_the_worker(site: Site) -> None:
    workers = site.cluster.pids("worker")
    site.cluster.pause_restarts("worker-1")
    site.cluster.kill("worker-1")
    try:
        site.arm("oom", times=2)
        for _ in range(2):
            job = site.cluster.wait_for_end(site.submit(**SHORT))
            assert job["failure"]["code"] == "out_of_device_memory"
        wait_until(
            lambda: site.cluster.pids("worker")["worker-0"] != workers["worker-0"],
            RECOVERED_S,
            "the worker is replaced",
            site.cluster.logs,
        )
    finally:
        site.cluster.resume_restarts("worker-1")
    site.succeeded(site.submit(**SHORT))
    site.cluster.wait_until_ready()


def test_hanging_device_is_noticed_and_the_job_run_elsewhere(site: Site) -> None:
    job_id = site.submit(**LONG)
    worker = site.cluster.wait_for_step(job_id, 3)
    pid = site.cluster.pids("worker")[worker]
    site.arm("hang", times=1)
    site.wait_until_back(job_id, attempts=1)
    assert site.succeeded(job_id)["lost"] == 1
    assert site.cluster.pids("worker")[worker] != pid
    assert site.armed() == 0
    site.cluster.wait_until_ready()


def test_a_job_that_ends_every_worker_is_given_up(site: Site) -> None:
    """A poison pill ends two workers and no more."""
    restarts = site.cluster.restarts
    site.arm("die", times=5)
    job_id = site.submit(**SHORT)
    job = site.cluster.wait_for_end(job_id)
    site.disarm()
    assert (job["state"], job["attempts"], job["lost"]) == ("failed", 2, 2)
    assert job["failure"]["code"] == "worker_lost"
    site.cluster.wait_until_ready()
    assert site.cluster.restarts - restarts == 2
    site.succeeded(site.submit(**SHORT))


def test_everything_at_once(site: Site) -> None:
    """Callers send requests while Valkey, the API and a worker are killed within a second."""
    with ThreadPoolExecutor(4) as callers:
        asked = [callers.submit(site.submit, **SHORT) for _ in range(12)]
        time.sleep(1)
        for name in ("valkey", "api-0", "worker-0", "api-1"):
            site.cluster.kill(name)
            time.sleep(0.2)
        jobs = [each.result() for each in asked]
    for job_id in jobs:
        site.succeeded(job_id)


def test_every_accepted_job_has_ended_exactly_once(site: Site) -> None:
    assert len(set(site.accepted)) == len(site.accepted) > 20
    for job_id in site.accepted:
        job = site.cluster.job(job_id)
        assert job["state"] in ENDED
        assert site.cluster.end_states(job_id) == [job["state"]]
        files = list((site.cluster.artifacts / "videos" / job_id).glob("*.mp4"))
        # A worker killed between storing a video and recording it leaves a file that no record
        # names; retention deletes it. A video that a record names exists.
        assert len(files) >= (job["state"] == "succeeded")
    assert not list(site.cluster.artifacts.rglob(".incoming-*"))
