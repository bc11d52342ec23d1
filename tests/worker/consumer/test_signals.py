"""Test with worker processes what SIGTERM does to the current job, in both drain modes."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.workers import read_statuses
from tests.support.worker_processes import (
    QUEUE,
    REQUEST,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)

LONG = REQUEST.model_copy(update={"num_inference_steps": 1000})


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(redis_url, tmp_path)
    yield workers
    workers.stop()


def count_lost(redis: Redis) -> int:
    found = redis.hscan_iter(redis_keys.METRICS, match="lost|*")
    return sum(int(count) for _, count in found)


def test_sigterm_finishes_the_current_job_and_takes_no_other(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    first, second = store.create(REQUEST, QUEUE).job, store.create(REQUEST, QUEUE).job
    process = workers.start(0.5)
    wait_for(store, first.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert catalog.read(redis).offers == ()
    (status,) = read_statuses(redis)
    assert (status.state, status.job_id) == ("draining", first.id)
    assert process.wait(30) == 0
    assert store.get(first.id).state is JobState.SUCCEEDED
    assert store.get(second.id).state is JobState.QUEUED
    assert read_statuses(redis) == ()
    assert count_lost(redis) == 0


def test_sigterm_returns_the_current_job_when_configured_so(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job, behind = store.create(LONG, QUEUE).job, store.create(LONG, QUEUE).job
    process = workers.start(0.1, WORKER_DRAIN="requeue")
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.QUEUED, 1, 0)
    assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [job.id.encode(), behind.id.encode()]
    assert count_lost(redis) == 0
    # The next worker can take it, because RQ did not mark its job as finished.
    store.cancel(behind.id)
    other = workers.start(0.01)
    wait_for(store, job.id, is_denoising)
    assert store.get(job.id).attempts == 2
    other.kill()


def test_a_second_sigterm_returns_the_job_that_the_first_would_have_finished(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job = store.create(LONG, QUEUE).job
    process = workers.start(0.1)
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    record = store.get(job.id)
    assert (record.state, record.lost, record.failure) == (JobState.QUEUED, 0, None)
    assert not redis.keys("rq:failed:*")


def test_a_job_that_is_to_be_cancelled_is_not_returned(
    workers: WorkerProcesses, store: JobStore
) -> None:
    """Both requests arrive while a step runs in native code; the cancel is what is written."""
    job = store.create(LONG, QUEUE).job
    process = workers.start(1.5, WORKER_DRAIN="requeue")
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    store.cancel(job.id)
    assert process.wait(10) == 0
    assert wait_for(store, job.id, has_ended, 1).state is JobState.CANCELLED


def test_sigterm_ends_an_idle_worker(workers: WorkerProcesses, redis: Redis) -> None:
    process = workers.start(0)
    wait_until(lambda: catalog.read(redis).offers, 60, "the worker offers its modes")

    def states() -> list[str]:
        return [status.state for status in read_statuses(redis)]

    wait_until(lambda: states() == ["idle"], 60, "the worker says that it is idle")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert catalog.read(redis).offers == ()
