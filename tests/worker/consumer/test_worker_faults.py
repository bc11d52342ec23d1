"""Test workers as processes that are killed, stopped, hang, run out of memory, or lose Redis."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.support.killable_valkey import KillableValkey
from tests.support.worker_processes import (
    QUEUE,
    REQUEST,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine
from worker.errors import EXIT_HUNG, EXIT_OUT_OF_MEMORY

REDELIVERED_WITHIN_S = 30
"""The documented limit for the job of a killed worker while another worker is idle."""

LONG = REQUEST.model_copy(update={"num_inference_steps": 1000})


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(redis_url, tmp_path)
    yield workers
    workers.stop()


def test_the_job_of_a_killed_worker_is_run_by_another_with_the_files_it_left_gone(
    workers: WorkerProcesses,
    store: JobStore,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both workers have production's timing, so the documented limit applies."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    job = store.create(LONG, QUEUE).job
    process = workers.start(0.1, TMPDIR=str(tmp_path))
    wait_for(store, job.id, is_denoising)
    (left,) = tmp_path.glob("wan-worker-*")
    process.kill()
    process.wait()
    killed, begun = time.monotonic(), list[float]()
    other_worker = ResidentWorker(
        FakeEngine(lambda step: begun.append(time.monotonic())),
        redis,
        FolderArtifactStore(workers.artifacts),
    )
    other_worker.work(max_jobs=1, logging_level="WARNING")
    assert begun[0] - killed < REDELIVERED_WITHIN_S
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 2, 1)
    assert record.video is not None
    assert re.fullmatch(rf"videos/{job.id}/2-[0-9a-f]{{8}}\.mp4", record.video.key)
    assert not left.exists()
    assert not redis.zrange(f"rq:wip:{QUEUE}", 0, time.time(), byscore=True)


def test_a_hanging_engine_ends_its_process_and_the_second_time_its_job(
    workers: WorkerProcesses, store: JobStore
) -> None:
    job = store.create(REQUEST, QUEUE).job
    for state in (JobState.QUEUED, JobState.FAILED):
        process = workers.start(0.01, "hang", WORKER_STALL_FLOOR_S="1")
        assert process.wait(30) == EXIT_HUNG
        assert store.get(job.id).state is state  # given up at once, long before the lease expires
    record = store.get(job.id)
    assert (record.attempts, record.lost) == (2, 2)
    assert record.failure is not None
    assert record.failure.code == "worker_lost"
    log = workers.log_text()
    assert "no sign of life from the job for 1 s" in log
    assert 'fake_worker.py", line' in log  # the stack of the hanging thread
    assert f"{job.id}] the job was given up and is queued" in log


def test_out_of_memory_fails_the_job_once_and_the_process_the_second_time(
    workers: WorkerProcesses, store: JobStore
) -> None:
    first, second = store.create(REQUEST, QUEUE).job, store.create(REQUEST, QUEUE).job
    process = workers.start(0.01, "oom")
    assert process.wait(30) == EXIT_OUT_OF_MEMORY
    for job in (first, second):
        record = store.get(job.id)
        assert (record.state, record.attempts) == (JobState.FAILED, 1)
        assert record.failure is not None
        assert record.failure.code == "out_of_device_memory"
        assert "9 frames of 64x32; ask for fewer frames or a smaller size" in record.failure.detail


def test_a_stopped_worker_that_wakes_up_stops_and_stores_nothing(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job = store.create(REQUEST.model_copy(update={"num_inference_steps": 8}), QUEUE).job
    process = workers.start(0.5)
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGSTOP)
    redis.hset(redis_keys.record(job.id), "lease_ms", 1)  # as it will be soon
    try:
        other_worker = ResidentWorker(FakeEngine(), redis, FolderArtifactStore(workers.artifacts))
        other_worker.work(max_jobs=1, logging_level="WARNING")
    finally:
        process.send_signal(signal.SIGCONT)
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 2, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert store.get(job.id) == record
    assert record.video is not None
    (stored,) = workers.artifacts.rglob("*.mp4")
    assert stored == workers.artifacts / record.video.key


@pytest.fixture
def killable_workers(killable_valkey: KillableValkey, tmp_path: Path) -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(killable_valkey.url, tmp_path)
    yield workers
    workers.stop()


def test_a_job_survives_a_redis_that_is_killed_and_away_for_longer_than_its_lease(
    killable_valkey: KillableValkey, killable_workers: WorkerProcesses
) -> None:
    """The engine ends while Redis is away; the video waits to be recorded."""
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        job = store.create(REQUEST.model_copy(update={"num_inference_steps": 10}), QUEUE).job
        process = killable_workers.start(0.2)
        wait_for(store, job.id, is_denoising)
        # As if Redis were away for a minute: the lease has expired, and recovery has not run since.
        redis.hset(redis_keys.record(job.id), "lease_ms", 1)
        redis.hset(redis_keys.RECOVERY, "looked_ms", 1)
        killable_valkey.kill()
        time.sleep(4)
        killable_valkey.start()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        # The same process runs the next job.
        again = store.create(REQUEST, QUEUE).job
        assert wait_for(store, again.id, has_ended, 30).state is JobState.SUCCEEDED
        assert process.poll() is None
    log = killable_workers.log_text()
    assert log.count("Redis is away") == log.count("Redis is back") == 1, log
    assert "Traceback" not in log


def test_an_idle_worker_waits_for_a_killed_redis_and_stops_without_one(
    killable_valkey: KillableValkey, killable_workers: WorkerProcesses
) -> None:
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        process = killable_workers.start(0.01)
        first = store.create(REQUEST, QUEUE).job
        wait_for(store, first.id, has_ended)
        killable_valkey.kill()
        time.sleep(1.5)
        killable_valkey.start()
        job = store.create(REQUEST, QUEUE).job
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        # A worker that started again has a new name, and its old entry must have expired.
        wait_until(
            lambda: len(catalog.read(redis).offers) == 1,
            redis_keys.OFFER_TTL_S + 5,
            "there is one offer",
            lambda: str(catalog.read(redis).offers),
            every_s=0.2,
        )
        killable_valkey.kill()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "Traceback" not in killable_workers.log_text()


def test_a_job_runs_on_while_redis_hangs(
    killable_valkey: KillableValkey, killable_workers: WorkerProcesses
) -> None:
    """The engine's thread does not wait for Redis: steps go on, and the watchdog does nothing."""
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        job = store.create(REQUEST.model_copy(update={"num_inference_steps": 20}), QUEUE).job
        process = killable_workers.start(0.1, WORKER_STALL_FLOOR_S="1")
        wait_for(store, job.id, is_denoising)
        killable_valkey.freeze()
        time.sleep(6)  # thrice as long as the job's steps take
        killable_valkey.thaw()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        assert record.timings is not None
        assert record.timings.total_s < 6
        assert process.poll() is None


def test_a_worker_that_loses_redis_before_its_claim_repeats_it(
    killable_valkey: KillableValkey, killable_workers: WorkerProcesses
) -> None:
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        job = store.create(REQUEST, QUEUE).job
        process = killable_workers.start(0.01, str(killable_valkey.pid))
        killable_valkey.wait_for_exit()
        time.sleep(1.5)
        killable_valkey.start()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    ready = killable_workers.log_text().count(" serves plain of fake")
    assert ready == 1, "one worker ran throughout"


def test_a_worker_that_returns_its_job_waits_for_no_redis(
    killable_valkey: KillableValkey, killable_workers: WorkerProcesses
) -> None:
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        job = store.create(LONG, QUEUE).job
        process = killable_workers.start(0.1, WORKER_DRAIN="requeue")
        wait_for(store, job.id, is_denoising)
        killable_valkey.kill()
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        killable_valkey.start()
        assert store.get(job.id).state is JobState.RUNNING  # until recovery finds it abandoned
    assert "Traceback" not in killable_workers.log_text()
