"""Test two workers that share a Redis, a store and a time which fail: every job ends once.

Redis refuses commands in eight ways; the store is missing for one worker; the clock of one host is
ahead. The engine is a fake; services, workers, Valkey and mounts are real.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.faulty_host import Share
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until
from jobs import redis_keys
from tests.e2e.two_workers import TwoWorkers
from tests.jobs.redis_client.refusing_valkey import FAULTS, Server, forget_scripts

pytestmark = pytest.mark.slow

HELD_S = 2.0
"""How long Redis refuses each time."""

needs_mount = pytest.mark.skipif(
    not Share.can_mount(), reason="only root can mount; tests/jobs removes a store without"
)


# ---------------------------------------------------------------------------- Redis


@contextmanager
def refusing(server: Server, code: str) -> Iterator[None]:
    begin, end = FAULTS[code]
    begin(server)
    try:
        yield
    finally:
        end(server)


@contextmanager
def without_scripts(server: Server) -> Iterator[None]:
    """Have no script found, however often they are loaded."""
    ending = threading.Event()

    def flush() -> None:
        while not ending.wait(0.02):
            forget_scripts(server)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextmanager
def loading(site: TwoWorkers) -> Iterator[None]:
    """Restart Valkey, which then needs some seconds for its data."""
    redis = site.cluster.redis
    with redis.pipeline(transaction=False) as pipe:
        for number in range(6000):
            pipe.set(f"key-{number}", "value")
        pipe.execute()
    site.cluster.add_options("valkey", "--key-load-delay", "400")
    site.cluster.kill("valkey")
    yield


def test_forty_jobs_are_run_once_each_while_redis_refuses_in_every_way(tmp_path: Path) -> None:
    with TwoWorkers(tmp_path / "cluster", {}, step_s=0.3) as site:
        server = Server(
            site.cluster.redis, site.cluster.folder / "valkey", site.cluster.valkey_port
        )
        faults = {code: refusing(server, code) for code in FAULTS}
        phases = {"LOADING": loading(site), "NOSCRIPT": without_scripts(server), **faults}
        jobs: list[str] = []
        with ThreadPoolExecutor(1) as callers:
            for code, fault in phases.items():
                jobs += site.submit(3)
                running = lambda: site.states()["busy"] == 2  # noqa: E731
                wait_until(running, 30, "both run a job", site.cluster.logs)
                with fault:
                    asked = callers.submit(site.submit, 2)
                    time.sleep(HELD_S)
                    assert asked.done() == (code == "NOSCRIPT"), code
                jobs += asked.result()
        site.wait_until_ended(jobs)
        assert len(set(jobs)) == 40
        assert site.check(jobs) == {1: 40}, "no attempt was spent on what Redis refused"
        assert site.returned() == 0
        assert site.cluster.restarts == 1, "nothing but Valkey was started again"


# ---------------------------------------------------------------------------- the store


@needs_mount
def test_forty_jobs_are_stored_while_the_share_of_one_worker_comes_and_goes(
    tmp_path: Path,
) -> None:
    share, another = Share(tmp_path / "host-0" / "share"), tmp_path / "another"
    another.mkdir()
    site = TwoWorkers(tmp_path / "cluster", {"worker-0": share.environment})
    share.mount(site.cluster.artifacts)
    try:
        with site:
            first = site.submit(15)
            site.wait_until_ended(first, least=4)
            share.unmount()
            time.sleep(3)
            share.mount(site.cluster.artifacts)
            site.wait_until_ended(first)
            assert site.check(first) == {1: 15}, "a moment without the store costs nothing"

            second = site.submit(15)
            site.wait_until_ended(second, least=4)
            share.unmount()
            share.mount(another)

            def is_out() -> bool:
                # A video that was stored just before counts as stored: its pictures alone waited,
                # and it takes another job to find the store missing.
                if site.ended(second) == len(second):
                    second.extend(site.submit(1))
                return site.states() == {"degraded": 1, "idle": 1}

            wait_until(is_out, 60, "the worker without its store is out", site.cluster.logs)
            share.unmount()
            site.wait_until_ended(second)
            waited = {1: len(second) - 1, 2: 1}
            assert site.check(second) == waited, "one attempt waited for the store"
            assert site.returned() == 1
            fault = site.cluster.request("GET", "/readyz").json()["faults"]
            assert "artifact store is missing" in fault[0]

            alone = site.submit(5)
            site.wait_until_ended(alone)
            assert site.check(alone) == {1: 5}, "the other worker ran them"
            assert not list(another.iterdir()), "nothing was written into what is not the store"
            assert not list(share.mount_point.iterdir()), "nor where nothing is mounted"
            share.mount(site.cluster.artifacts)
            site.cluster.wait_until_ready(60)
            last = site.submit(5)
            site.wait_until_ended(last)
            site.check(first + second + alone + last)
            assert site.states() == {"idle": 2}
    finally:
        share.unmount_all()


# ---------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("ahead", [timedelta(hours=1), timedelta(days=8)], ids=str)
def test_forty_jobs_end_and_nothing_vanishes_while_the_clock_of_one_host_is_ahead(
    tmp_path: Path, ahead: timedelta
) -> None:
    shift = Path(__file__).with_name("clock_ahead")
    host = {
        "CLOCK_AHEAD_S": str(ahead.total_seconds()),
        "PYTHONPATH": os.pathsep.join([str(shift), str(ROOT)]),
    }
    with TwoWorkers(tmp_path / "cluster", {"worker-0": host, "api-0": host}, apis=2) as site:
        cluster = site.cluster
        shifted = clock_of(cluster.urls[0]) - ahead
        assert abs(shifted - datetime.now(UTC)) < timedelta(seconds=10), "one service is ahead"
        first = site.submit(20)
        seen = sightings(cluster.urls, lambda: site.ended(first) == len(first))
        # At its start each service process looks whether something is to be deleted.
        cluster.kill("api-0")
        second = site.submit(20)
        refused = lambda: cluster.redis.exists(redis_keys.RETENTION_REFUSED)  # noqa: E731
        wait_until(lambda: bool(refused()), 30, "retention refuses this clock", cluster.logs)
        cluster.kill("api-1")
        cluster.wait_until_ready()
        seen += sightings(cluster.urls, lambda: site.ended(second) == len(second), least_s=8)
        assert set(seen) == {2}, f"both services see both workers: {seen}"

        command = [sys.executable, "-m", "service", "retention"]
        for environment, status in ((host, 1), ({}, 0)):
            ran = subprocess.run(
                command,
                cwd=ROOT,
                env=cluster.environment | environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == status, ran.stderr
            assert ("clock" in ran.stderr) == bool(status)
        assert site.check(first + second) == {1: 40}
        assert site.returned() == 0


def clock_of(url: str) -> datetime:
    """Return the time that a service says it is, to a second or two."""
    return parsedate_to_datetime(httpx.get(f"{url}/healthz").headers["date"])


def sightings(
    urls: list[str], done: Callable[[], bool], least_s: float = 0
) -> collections.Counter[int]:
    """Count how many workers each service saw, again and again until `done`."""
    seen: collections.Counter[int] = collections.Counter()
    ending = time.monotonic() + least_s
    while not done() or time.monotonic() < ending:
        for url in urls:
            answer = httpx.get(f"{url}/workers").json()
            seen[len(answer["workers"])] += 1
        time.sleep(0.3)
    return seen
