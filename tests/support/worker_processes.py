"""Start worker processes for tests, and wait for the state of their jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.support.requests import generation_request
from worker.engine.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
REQUEST = generation_request(model="fake", mode="plain", size="64x32", num_frames=9)
QUEUE = catalog.queue_name(FakeEngine.model, FakeEngine.modes)


class WorkerProcesses:
    """Worker processes with one Redis and one artifact folder; `stop` kills all of them."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.artifacts = folder / "artifacts"
        self.log = folder / "worker.log"
        self._redis_url = redis_url
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, seconds_per_step: float, fault: str | None = None, **settings: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.fake_worker"]
        command += [self._redis_url, str(self.artifacts), str(seconds_per_step)]
        command += [fault] if fault else []
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stderr=log, stdout=log
            )
        self._started.append(process)
        return process

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8")


def wait_for(
    store: JobStore, job_id: str, reached: Callable[[JobRecord], bool], seconds: float = 60
) -> JobRecord:
    wait_until(
        lambda: reached(store.get(job_id)),
        seconds,
        f"job {job_id} reaches the state",
        lambda: str(store.get(job_id)),
        every_s=0.05,
    )
    return store.get(job_id)


def is_denoising(record: JobRecord) -> bool:
    progress = record.progress
    return progress is not None and progress.stage == "denoise" and progress.step > 0


def has_ended(record: JobRecord) -> bool:
    return JobState(record.state).is_terminal


@contextmanager
def fake_worker(log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker process that fails every job of three steps or more."""
    arguments = [environment["REDIS_URL"], environment["ARTIFACTS_FOLDER"], "0.01", "oom"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fake_worker", *arguments],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        process.kill()
        process.wait()
