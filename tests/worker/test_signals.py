"""Workers as processes: what SIGTERM and SIGKILL do to the job in hand."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from jobs import catalog
from jobs.artifact_folder import FolderArtifactStore
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store import JobStore
from tests.worker.orders import order
from tests.worker.pattern_engine import PatternEngine
from worker.resident import ResidentWorker

ROOT = Path(__file__).resolve().parents[2]
ORDER = order(model="pattern", mode="plain", size="64x32", num_frames=9)
QUEUE = catalog.queue_name(PatternEngine.model, PatternEngine.modes)
REDELIVERED_WITHIN_S = 30
"""What is promised of the job of a killed worker, as long as another worker is idle."""

Start = Callable[[float], subprocess.Popen[bytes]]


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Start]:
    """Start worker processes with a given time per step; none is left behind."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(seconds_per_step: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.worker.pattern_engine"]
        command += [redis_url, str(tmp_path / "artifacts"), str(seconds_per_step)]
        started.append(subprocess.Popen(command, cwd=ROOT))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def wait_for(
    store: JobStore, job_id: str, reached: Callable[[JobRecord], bool], seconds: float = 60
) -> JobRecord:
    deadline = time.monotonic() + seconds
    while not reached(record := store.get(job_id)):
        assert time.monotonic() < deadline, f"still {record}"
        time.sleep(0.05)
    return record


def is_denoising(record: JobRecord) -> bool:
    return record.progress is not None and record.progress.stage == "denoise"


def test_sigterm_finishes_the_job_in_hand_and_takes_no_other(
    start: Start, store: JobStore, redis: Redis
) -> None:
    first, second = store.create(ORDER, QUEUE).job, store.create(ORDER, QUEUE).job
    process = start(0.5)
    wait_for(store, first.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert store.get(first.id).state is JobState.SUCCEEDED
    assert store.get(second.id).state is JobState.QUEUED
    assert catalog.read(redis).offers == ()


def test_sigterm_ends_an_idle_worker(start: Start, redis: Redis) -> None:
    process = start(0)
    deadline = time.monotonic() + 60
    while not catalog.read(redis).offers:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert catalog.read(redis).offers == ()


def test_the_job_of_a_killed_worker_is_run_by_another(
    start: Start, store: JobStore, redis: Redis, tmp_path: Path
) -> None:
    """Both workers have production's timing: the bound is the one that is promised."""
    job = store.create(ORDER.model_copy(update={"num_inference_steps": 1000}), QUEUE).job
    process = start(0.1)
    wait_for(store, job.id, is_denoising)
    process.kill()
    process.wait()
    killed, begun = time.monotonic(), list[float]()
    rescuer = ResidentWorker(
        PatternEngine(lambda step: begun.append(time.monotonic())),
        redis,
        FolderArtifactStore(tmp_path / "artifacts"),
    )
    rescuer.work(max_jobs=1, logging_level="WARNING")
    assert begun[0] - killed < REDELIVERED_WITHIN_S
    record = store.get(job.id)
    assert record.state is JobState.SUCCEEDED
    assert record.attempts == 2
    assert record.video is not None
    assert record.video.key == f"videos/{job.id}/2.mp4"
