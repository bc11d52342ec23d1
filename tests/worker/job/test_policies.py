"""Test what a worker does when memory is full or a device is lost, and what it measures."""

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

from jobs import durations, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.record import JobRecord, Progress
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from jobs.store.workers import WorkerStatus, read_statuses
from tests.support.worker_processes import QUEUE, REQUEST
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.fake_engine import FakeEngine, OnStep
from worker.errors import EXIT_DEVICE_LOST, EXIT_OUT_OF_MEMORY
from worker.interface import DeviceMemory
from worker.process.stats import WorkerStats

SHORT = REQUEST.model_copy(update={"num_inference_steps": 2})


@dataclass(frozen=True)
class RecordingDevice(Device):
    """A device that records, each time its cache is emptied, which tensors are still referenced."""

    tensors: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def empty_cache(self) -> None:
        gc.disable()  # what only a collection would free counts as alive
        self.alive.append(sum(ref() is not None for ref in self.tensors))
        gc.enable()
        super().empty_cache()


@dataclass
class WorkerRuns:
    """Runs one worker after another on one Redis; `stats` are those of the last one."""

    redis: Redis
    store: JobStore
    artifacts: FolderArtifactStore
    device: Device = field(default_factory=lambda: Device("cpu", "none"))
    stats: WorkerStats = field(default_factory=WorkerStats)

    def run(self, on_step: OnStep, jobs: int = 1) -> list[JobRecord]:
        """Run new jobs until the queue is empty or the worker ends by itself."""
        names = [self.store.create(SHORT, QUEUE).job.id for _ in range(jobs)]
        self.stats = WorkerStats()
        engine = FakeEngine(on_step)
        engine.device = self.device
        worker = ResidentWorker(engine, self.redis, self.artifacts, self.stats)
        worker.work(burst=True, logging_level="WARNING")
        return [self.store.get(name) for name in names]


@pytest.fixture
def runs(redis: Redis, store: JobStore, tmp_path: Path) -> WorkerRuns:
    return WorkerRuns(redis, store, FolderArtifactStore(tmp_path / "artifacts"))


def codes(records: list[JobRecord]) -> list[str | None]:
    return [None if record.failure is None else record.failure.code for record in records]


def full_at(*calls: int) -> OnStep:
    """Run out of memory at these calls, counted from 1; a job makes two."""
    count = 0

    def on_step(step: int) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("2 GiB wanted")

    return on_step


def test_out_of_memory_twice_in_a_row_ends_the_worker_before_the_next_job(runs: WorkerRuns) -> None:
    records = runs.run(full_at(1, 2), jobs=3)
    assert codes(records) == ["out_of_device_memory", "out_of_device_memory", None]
    assert records[2].state is JobState.QUEUED
    assert runs.stats.exit_status == EXIT_OUT_OF_MEMORY


def test_a_success_in_between_makes_it_not_in_a_row(runs: WorkerRuns) -> None:
    records = runs.run(full_at(1, 4), jobs=3)
    assert codes(records) == ["out_of_device_memory", None, "out_of_device_memory"]
    assert runs.stats.exit_status is None


def raise_from(error: Exception) -> None:
    raise torch.OutOfMemoryError("again") from error


def raise_meanwhile(error: Exception) -> None:
    raise torch.OutOfMemoryError("again")


def raise_without_a_cause(error: Exception) -> None:
    raise torch.OutOfMemoryError("again") from None


def raise_from_another(error: Exception) -> None:
    raise torch.OutOfMemoryError("again") from ValueError("something else")


@pytest.mark.parametrize(
    "raise_again", [raise_from, raise_meanwhile, raise_without_a_cause, raise_from_another]
)
def test_nothing_refers_to_the_failed_jobs_tensors_when_the_cache_is_emptied(
    runs: WorkerRuns, raise_again: Callable[[Exception], None]
) -> None:
    """Neither the stack frames of the error nor those of its cause or context."""
    device = RecordingDevice("cpu", "a device")
    runs.device = device

    def allocate() -> None:
        tensor = torch.zeros(8)
        device.tensors.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("2 GiB wanted")

    def on_step(step: int) -> None:
        tensor = torch.ones(8)
        device.tensors.append(weakref.ref(tensor))
        try:
            allocate()
        except torch.OutOfMemoryError as error:
            raise_again(error)

    assert codes(runs.run(on_step)) == ["out_of_device_memory"]
    assert len(device.tensors) == 2
    assert device.alive == [0]


class LostDevice(Device):
    """A device whose driver refuses every call."""

    def memory(self) -> DeviceMemory | None:
        raise RuntimeError("ERR00100 PTA call acl api failed")

    def empty_cache(self) -> None:
        raise RuntimeError("ERR00100 PTA call acl api failed")


def test_a_lost_device_ends_the_worker_and_gives_the_job_to_another(runs: WorkerRuns) -> None:
    def lose(step: int) -> None:
        raise RuntimeError("The process exits for this inner error, and the operator is aclnnMul.")

    runs.device = LostDevice("npu", "a device")
    (record,) = runs.run(lose)
    assert record.state is JobState.QUEUED
    assert (record.attempts, record.lost) == (1, 1)
    assert runs.stats.exit_status == EXIT_DEVICE_LOST
    assert read_statuses(runs.redis) == ()


def test_measured_durations_give_the_next_job_its_seconds_left(runs: WorkerRuns) -> None:
    seen: list[Progress | None] = []

    def observe(step: int) -> None:
        time.sleep(0.1)
        (job_id,) = [each.id for each in runs.store.list(JobState.RUNNING).jobs]
        seen.append(runs.store.get(job_id).progress)

    assert durations.read(runs.redis, SHORT) is None
    runs.run(observe)
    measured = durations.read(runs.redis, SHORT)
    assert measured is not None
    # As the fake engine reports them.
    assert (measured.step_s, measured.text_encoding_s) == (0.75, 0.5)
    assert seen[0] is not None
    assert seen[0].seconds_left is None
    runs.run(observe)
    assert seen[2] is not None
    assert seen[2].seconds_left == pytest.approx(2 * 0.75 + measured.rest_s, abs=1)


def test_the_status_says_what_the_worker_does_and_has_measured(runs: WorkerRuns) -> None:
    seen: list[WorkerStatus] = []

    def observe(step: int) -> None:
        time.sleep(0.2)
        seen.extend(read_statuses(runs.redis))

    (first,) = runs.run(observe)
    assert {(status.state, status.job_id) for status in seen} == {("busy", first.id)}
    assert runs.stats.jobs_done == 1
    step_s = runs.stats.modes()["plain"].step_s
    assert step_s is not None
    assert step_s > 0.2
    assert read_statuses(runs.redis) == ()


class WaitingStore(FolderArtifactStore):
    """A store that waits for ever, as for a full disk, and keeps calling `check`."""

    def put(
        self,
        key: str,
        source: Path,
        check: Callable[[], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        assert check is not None
        while True:
            check()
            time.sleep(0.01)


def test_a_job_is_cancelled_while_its_video_is_stored(runs: WorkerRuns, tmp_path: Path) -> None:
    runs.artifacts = WaitingStore(tmp_path / "full")

    def cancel_soon(step: int) -> None:
        if step == 2:
            (job,) = runs.store.list(JobState.RUNNING).jobs
            threading.Timer(0.5, runs.store.cancel, (job.id,)).start()

    (record,) = runs.run(cancel_soon)
    assert record.state is JobState.CANCELLED


def test_a_claim_that_redis_refuses_loses_nothing_though_rq_calls_its_job_failed(
    runs: WorkerRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.store.recovery.MISSING_S", 0.0)
    job = runs.store.create(SHORT, QUEUE).job
    # During the claim the record has a type that no script can read.
    runs.redis.rename(redis_keys.record(job.id), "aside")
    runs.redis.set(redis_keys.record(job.id), "no hash")
    worker = ResidentWorker(FakeEngine(), runs.redis, runs.artifacts)
    worker.work(burst=True, logging_level="CRITICAL")
    runs.redis.rename("aside", redis_keys.record(job.id))
    fetched = Job.fetch(job.id, connection=runs.redis, serializer=JSONSerializer)
    assert fetched.get_status() is JobStatus.FAILED
    recovery = Recovery(runs.redis)
    recovery.run()
    assert recovery.run() == {job.id: "queued"}
    runs.run(lambda step: None)
    record = runs.store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)
