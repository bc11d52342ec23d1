"""What a worker makes of memory that is full, of a device that is lost, and of what it measures."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from jobs import catalog, durations, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.catalog import WorkerStatus
from jobs.record import JobRecord, Progress
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from tests.support.worker_processes import ORDER, QUEUE
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.fake_engine import FakeEngine, OnStep
from worker.errors import EXIT_DEVICE_LOST, EXIT_OUT_OF_MEMORY
from worker.interface import DeviceMemory
from worker.process.stats import WorkerStats

SHORT = ORDER.model_copy(update={"num_inference_steps": 2})


@dataclass(frozen=True)
class Card(Device):
    """A device that notes, each time its cache is emptied, which tensors are still referred to."""

    tensors: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def empty_cache(self) -> None:
        gc.disable()  # what only a collection would free counts as alive
        self.alive.append(sum(ref() is not None for ref in self.tensors))
        gc.enable()
        super().empty_cache()


@dataclass
class Bench:
    """A worker at a time over one Redis; `journal` is that of the last one."""

    redis: Redis
    store: JobStore
    artifacts: FolderArtifactStore
    device: Device = field(default_factory=lambda: Device("cpu", "none"))
    journal: WorkerStats = field(default_factory=WorkerStats)

    def run(self, on_step: OnStep, jobs: int = 1) -> list[JobRecord]:
        """Run new jobs until the queue is empty or the worker ends by itself."""
        names = [self.store.create(SHORT, QUEUE).job.id for _ in range(jobs)]
        self.journal = WorkerStats()
        engine = FakeEngine(on_step)
        engine.device = self.device
        worker = ResidentWorker(engine, self.redis, self.artifacts, self.journal)
        worker.work(burst=True, logging_level="WARNING")
        return [self.store.get(name) for name in names]


@pytest.fixture
def bench(redis: Redis, store: JobStore, tmp_path: Path) -> Bench:
    return Bench(redis, store, FolderArtifactStore(tmp_path / "artifacts"))


def codes(records: list[JobRecord]) -> list[str | None]:
    return [None if record.failure is None else record.failure.code for record in records]


def full_at(*calls: int) -> OnStep:
    """Out of memory at these calls, counted from 1; a job has two."""
    count = 0

    def on_step(step: int) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("2 GiB wanted")

    return on_step


def test_out_of_memory_twice_in_a_row_ends_the_worker_before_the_next_job(bench: Bench) -> None:
    records = bench.run(full_at(1, 2), jobs=3)
    assert codes(records) == ["out_of_device_memory", "out_of_device_memory", None]
    assert records[2].state is JobState.QUEUED
    assert bench.journal.exit_status == EXIT_OUT_OF_MEMORY


def test_a_success_in_between_makes_it_not_in_a_row(bench: Bench) -> None:
    records = bench.run(full_at(1, 4), jobs=3)
    assert codes(records) == ["out_of_device_memory", None, "out_of_device_memory"]
    assert bench.journal.exit_status is None


def test_nothing_refers_to_the_failed_jobs_tensors_when_the_cache_is_emptied(
    bench: Bench,
) -> None:
    """Not the frames the error came through, and not those of the error it was made of."""
    card = Card("cpu", "a card")
    bench.device = card

    def allocate() -> None:
        tensor = torch.zeros(8)
        card.tensors.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("2 GiB wanted")

    def on_step(step: int) -> None:
        tensor = torch.ones(8)
        card.tensors.append(weakref.ref(tensor))
        try:
            allocate()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError("again") from error

    assert codes(bench.run(on_step)) == ["out_of_device_memory"]
    assert len(card.tensors) == 2
    assert card.alive == [0]


class Gone(Device):
    """A card whose driver refuses everything."""

    def memory(self) -> DeviceMemory | None:
        raise RuntimeError("ERR00100 PTA call acl api failed")

    def empty_cache(self) -> None:
        raise RuntimeError("ERR00100 PTA call acl api failed")


def test_a_lost_device_ends_the_worker_and_gives_the_job_to_another(bench: Bench) -> None:
    def lose(step: int) -> None:
        raise RuntimeError("The process exits for this inner error, and the operator is aclnnMul.")

    bench.device = Gone("npu", "a card")
    (record,) = bench.run(lose)
    assert record.state is JobState.QUEUED
    assert (record.attempts, record.lost) == (1, 1)
    assert bench.journal.exit_status == EXIT_DEVICE_LOST
    assert catalog.read_statuses(bench.redis) == ()


def test_a_measured_pace_gives_the_next_job_its_seconds_left(bench: Bench) -> None:
    seen: list[Progress | None] = []

    def look(step: int) -> None:
        time.sleep(0.1)
        (job_id,) = [each.id for each in bench.store.list(JobState.RUNNING).jobs]
        seen.append(bench.store.get(job_id).progress)

    assert durations.read(bench.redis, SHORT) is None
    bench.run(look)
    measured = durations.read(bench.redis, SHORT)
    assert measured is not None
    assert (measured.step_s, measured.texts_s) == (0.75, 0.5)  # what the engine says it took
    assert seen[0] is not None
    assert seen[0].seconds_left is None
    bench.run(look)
    assert seen[2] is not None
    assert seen[2].seconds_left == pytest.approx(2 * 0.75 + measured.rest_s, abs=1)


def test_the_status_says_what_the_worker_does_and_has_measured(bench: Bench) -> None:
    seen: list[WorkerStatus] = []

    def look(step: int) -> None:
        time.sleep(0.2)
        seen.extend(catalog.read_statuses(bench.redis))

    (first,) = bench.run(look)
    assert {(status.state, status.job_id) for status in seen} == {("busy", first.id)}
    assert bench.journal.jobs_done == 1
    step_s = bench.journal.modes()["plain"].step_s
    assert step_s is not None
    assert step_s > 0.2
    assert catalog.read_statuses(bench.redis) == ()


class Unhelpful(FolderArtifactStore):
    """Waits for ever for a disk that is full, and asks meanwhile whether it should."""

    def put(self, key: str, source: Path, check: Callable[[], None] | None = None) -> None:
        assert check is not None
        while True:
            check()
            time.sleep(0.01)


def test_a_job_is_cancelled_while_its_video_is_stored(bench: Bench, tmp_path: Path) -> None:
    bench.artifacts = Unhelpful(tmp_path / "full")

    def cancel_soon(step: int) -> None:
        if step == 2:
            (job,) = bench.store.list(JobState.RUNNING).jobs
            threading.Timer(0.5, bench.store.cancel, (job.id,)).start()

    (record,) = bench.run(cancel_soon)
    assert record.state is JobState.CANCELLED


def test_a_claim_that_redis_refuses_loses_nothing_though_rq_calls_its_job_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.store.recovery.MISSING_S", 0.0)
    job = bench.store.create(SHORT, QUEUE).job
    # For the length of the claim the record is of a kind that no script can read.
    bench.redis.rename(redis_keys.record(job.id), "aside")
    bench.redis.set(redis_keys.record(job.id), "no hash")
    worker = ResidentWorker(FakeEngine(), bench.redis, bench.artifacts)
    worker.work(burst=True, logging_level="CRITICAL")
    bench.redis.rename("aside", redis_keys.record(job.id))
    fetched = Job.fetch(job.id, connection=bench.redis, serializer=JSONSerializer)
    assert fetched.get_status() is JobStatus.FAILED
    recovery = Recovery(bench.redis)
    recovery.run()
    assert recovery.run() == {job.id: "queued"}
    bench.run(lambda step: None)
    record = bench.store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)
