"""Workers as processes: what SIGTERM does to the job in hand, in both ways to drain."""

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
from tests.support.worker_processes import (
    ORDER,
    QUEUE,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)

LONG = ORDER.model_copy(update={"num_inference_steps": 1000})


@pytest.fixture
def crew(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    crew = WorkerProcesses(redis_url, tmp_path)
    yield crew
    crew.dismiss()


def lost(redis: Redis) -> int:
    found = redis.hscan_iter(redis_keys.METRICS, match="lost|*")
    return sum(int(count) for _, count in found)


def test_sigterm_finishes_the_job_in_hand_and_takes_no_other(
    crew: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    first, second = store.create(ORDER, QUEUE).job, store.create(ORDER, QUEUE).job
    process = crew.hire(0.5)
    wait_for(store, first.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert catalog.read(redis).offers == ()
    (status,) = catalog.read_statuses(redis)
    assert (status.state, status.job_id) == ("draining", first.id)
    assert process.wait(30) == 0
    assert store.get(first.id).state is JobState.SUCCEEDED
    assert store.get(second.id).state is JobState.QUEUED
    assert catalog.read_statuses(redis) == ()
    assert lost(redis) == 0


def test_sigterm_gives_the_job_in_hand_back_when_told_so(
    crew: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job, behind = store.create(LONG, QUEUE).job, store.create(LONG, QUEUE).job
    process = crew.hire(0.1, WORKER_DRAIN="requeue")
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.QUEUED, 1, 0)
    assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [job.id.encode(), behind.id.encode()]
    assert lost(redis) == 0
    # Whoever takes it next can: RQ's side of it was not called finished.
    store.cancel(behind.id)
    other = crew.hire(0.01)
    wait_for(store, job.id, is_denoising)
    assert store.get(job.id).attempts == 2
    other.kill()


def test_a_second_sigterm_gives_back_what_the_first_would_have_finished(
    crew: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job = store.create(LONG, QUEUE).job
    process = crew.hire(0.1)
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    record = store.get(job.id)
    assert (record.state, record.lost, record.failure) == (JobState.QUEUED, 0, None)
    assert not redis.keys("rq:failed:*")


def test_a_job_that_is_to_be_cancelled_is_not_given_back(
    crew: WorkerProcesses, store: JobStore
) -> None:
    """A step is under way in native code when both wishes come: the cancel is what is written."""
    job = store.create(LONG, QUEUE).job
    process = crew.hire(1.5, WORKER_DRAIN="requeue")
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGTERM)
    store.cancel(job.id)
    assert process.wait(10) == 0
    assert wait_for(store, job.id, has_ended, 1).state is JobState.CANCELLED


def test_sigterm_ends_an_idle_worker(crew: WorkerProcesses, redis: Redis) -> None:
    process = crew.hire(0)
    wait_until(lambda: catalog.read(redis).offers, 60, "the worker offers its modes")
    assert [status.state for status in catalog.read_statuses(redis)] == ["idle"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert catalog.read(redis).offers == ()
