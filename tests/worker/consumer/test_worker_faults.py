"""Workers as processes that are killed, stopped, hang, run out of memory, or lose their Redis."""

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
    ORDER,
    QUEUE,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine
from worker.errors import EXIT_HUNG, EXIT_OUT_OF_MEMORY

REDELIVERED_WITHIN_S = 30
"""What is promised of the job of a killed worker, as long as another worker is idle."""

LONG = ORDER.model_copy(update={"num_inference_steps": 1000})


@pytest.fixture
def crew(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    crew = WorkerProcesses(redis_url, tmp_path)
    yield crew
    crew.dismiss()


def test_the_job_of_a_killed_worker_is_run_by_another_with_the_files_it_left_gone(
    crew: WorkerProcesses,
    store: JobStore,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both workers have production's timing: the bound is the one that is promised."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    job = store.create(LONG, QUEUE).job
    process = crew.hire(0.1, TMPDIR=str(tmp_path))
    wait_for(store, job.id, is_denoising)
    (left,) = tmp_path.glob("wan-worker-*")
    process.kill()
    process.wait()
    killed, begun = time.monotonic(), list[float]()
    rescuer = ResidentWorker(
        FakeEngine(lambda step: begun.append(time.monotonic())),
        redis,
        FolderArtifactStore(crew.artifacts),
    )
    rescuer.work(max_jobs=1, logging_level="WARNING")
    assert begun[0] - killed < REDELIVERED_WITHIN_S
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 2, 1)
    assert record.video is not None
    assert re.fullmatch(rf"videos/{job.id}/2-[0-9a-f]{{8}}\.mp4", record.video.key)
    assert not left.exists()
    assert not redis.zrange(f"rq:wip:{QUEUE}", 0, time.time(), byscore=True)


def test_a_hanging_engine_ends_its_process_and_the_second_time_its_job(
    crew: WorkerProcesses, store: JobStore
) -> None:
    job = store.create(ORDER, QUEUE).job
    for state in (JobState.QUEUED, JobState.FAILED):
        process = crew.hire(0.01, "hang", WORKER_STALL_FLOOR_S="1")
        assert process.wait(30) == EXIT_HUNG
        assert store.get(job.id).state is state  # given up at once, long before the lease ends
    record = store.get(job.id)
    assert (record.attempts, record.lost) == (2, 2)
    assert record.failure is not None
    assert record.failure.code == "worker_lost"
    said = crew.says()
    assert "no sign of life from the job for 1 s" in said
    assert 'fake_worker.py", line' in said  # where it hangs
    assert f"{job.id}] the job was given up and is queued" in said


def test_out_of_memory_fails_the_job_once_and_the_process_the_second_time(
    crew: WorkerProcesses, store: JobStore
) -> None:
    first, second = store.create(ORDER, QUEUE).job, store.create(ORDER, QUEUE).job
    process = crew.hire(0.01, "oom")
    assert process.wait(30) == EXIT_OUT_OF_MEMORY
    for job in (first, second):
        record = store.get(job.id)
        assert (record.state, record.attempts) == (JobState.FAILED, 1)
        assert record.failure is not None
        assert record.failure.code == "out_of_device_memory"
        assert "9 frames of 64x32; ask for fewer frames or a smaller size" in record.failure.detail


def test_a_stopped_worker_that_wakes_up_stops_and_stores_nothing(
    crew: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    job = store.create(ORDER.model_copy(update={"num_inference_steps": 8}), QUEUE).job
    process = crew.hire(0.5)
    wait_for(store, job.id, is_denoising)
    process.send_signal(signal.SIGSTOP)
    redis.hset(redis_keys.record(job.id), "lease_ms", 1)  # as it will be soon
    try:
        rescuer = ResidentWorker(FakeEngine(), redis, FolderArtifactStore(crew.artifacts))
        rescuer.work(max_jobs=1, logging_level="WARNING")
    finally:
        process.send_signal(signal.SIGCONT)
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 2, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert store.get(job.id) == record
    assert record.video is not None
    (stored,) = crew.artifacts.rglob("*.mp4")
    assert stored == crew.artifacts / record.video.key


@pytest.fixture
def mortal_crew(mortal: KillableValkey, tmp_path: Path) -> Iterator[WorkerProcesses]:
    crew = WorkerProcesses(mortal.url, tmp_path)
    yield crew
    crew.dismiss()


def test_a_job_survives_a_redis_that_is_killed_and_away_for_longer_than_its_lease(
    mortal: KillableValkey, mortal_crew: WorkerProcesses
) -> None:
    """The engine ends while Redis is away; the video waits to be recorded."""
    with mortal.connect() as redis:
        store = JobStore(redis)
        job = store.create(ORDER.model_copy(update={"num_inference_steps": 10}), QUEUE).job
        process = mortal_crew.hire(0.2)
        wait_for(store, job.id, is_denoising)
        # As if it were away for a minute: the lease has run out, and nobody has looked since.
        redis.hset(redis_keys.record(job.id), "lease_ms", 1)
        redis.hset(redis_keys.RECOVERY, "looked_ms", 1)
        mortal.kill()
        time.sleep(4)
        mortal.start()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        # The same process is there for the next one.
        again = store.create(ORDER, QUEUE).job
        assert wait_for(store, again.id, has_ended, 30).state is JobState.SUCCEEDED
        assert process.poll() is None
    said = mortal_crew.says()
    assert said.count("Redis is away") == said.count("Redis is back") == 1, said
    assert "Traceback" not in said


def test_an_idle_worker_waits_for_a_redis_that_is_killed_and_ends_without_one_when_told(
    mortal: KillableValkey, mortal_crew: WorkerProcesses
) -> None:
    with mortal.connect() as redis:
        store = JobStore(redis)
        process = mortal_crew.hire(0.01)
        first = store.create(ORDER, QUEUE).job
        wait_for(store, first.id, has_ended)
        mortal.kill()
        time.sleep(1.5)
        mortal.start()
        job = store.create(ORDER, QUEUE).job
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        # A worker that began anew has a new name, and could not take its old one back.
        wait_until(
            lambda: len(catalog.read(redis).offers) == 1,
            redis_keys.OFFER_TTL_S + 5,
            "there is one offer",
            lambda: str(catalog.read(redis).offers),
            every_s=0.2,
        )
        mortal.kill()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "Traceback" not in mortal_crew.says()


def test_a_job_runs_on_while_redis_hangs(
    mortal: KillableValkey, mortal_crew: WorkerProcesses
) -> None:
    """The engine's thread waits for nobody: steps go on, and the watchdog keeps quiet."""
    with mortal.connect() as redis:
        store = JobStore(redis)
        job = store.create(ORDER.model_copy(update={"num_inference_steps": 20}), QUEUE).job
        process = mortal_crew.hire(0.1, WORKER_STALL_FLOOR_S="1")
        wait_for(store, job.id, is_denoising)
        mortal.freeze()
        time.sleep(4)
        mortal.thaw()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
        assert record.timings is not None
        assert record.timings.total_s < 4
        assert process.poll() is None


def test_a_worker_that_loses_redis_before_its_claim_repeats_it(
    mortal: KillableValkey, mortal_crew: WorkerProcesses
) -> None:
    with mortal.connect() as redis:
        store = JobStore(redis)
        job = store.create(ORDER, QUEUE).job
        process = mortal_crew.hire(0.01, str(mortal.pid))
        mortal.wait_for_death()
        time.sleep(1.5)
        mortal.start()
        record = wait_for(store, job.id, has_ended, 30)
        assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert mortal_crew.says().count(" serves plain of pattern") == 1, "it was one worker throughout"


def test_a_worker_that_is_to_give_its_job_back_waits_for_no_redis(
    mortal: KillableValkey, mortal_crew: WorkerProcesses
) -> None:
    with mortal.connect() as redis:
        store = JobStore(redis)
        job = store.create(LONG, QUEUE).job
        process = mortal_crew.hire(0.1, WORKER_DRAIN="requeue")
        wait_for(store, job.id, is_denoising)
        mortal.kill()
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        mortal.start()
        assert store.get(job.id).state is JobState.RUNNING  # until somebody finds it abandoned
    assert "Traceback" not in mortal_crew.says()
