"""Test a job in the worker, with a real Valkey and the fake engine.

Every job takes production's path: `JobStore.create`, RQ's queue, `ResidentWorker.work`.
"""

import hashlib
import re
import shlex
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq.command import send_stop_job_command
from rq.exceptions import DeserializationError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from jobs import catalog, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from jobs.errors import GenerationFailed, PromptTooLong
from jobs.record import Attempt, JobRecord
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from jobs.store.submission import Submission
from jobs.store.workers import read_statuses
from tests.support.launcher import decode_video
from tests.support.requests import generation_request
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.fake_engine import FakeEngine, OnStep
from worker.errors import EXIT_DEVICE_LOST
from worker.job.attempt import _watchdog as watchdog
from worker.process.stats import WorkerStats
from worker.tasks import JOB_CONTEXT

REQUEST = generation_request(model="fake", mode="plain", size="64x32", num_frames=9, seed=200)
SECRET = "a prompt nobody may read in a log"
QUEUE = catalog.queue_name(FakeEngine.model, FakeEngine.modes)


@pytest.fixture
def artifacts(tmp_path: Path) -> FolderArtifactStore:
    return FolderArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def worker_for(redis: Redis, artifacts: FolderArtifactStore) -> Callable[[OnStep], ResidentWorker]:
    """A worker whose engine calls a function at each step, on the real CPU device."""

    def build(on_step: OnStep) -> ResidentWorker:
        engine = FakeEngine(on_step)
        engine.device = Device("cpu", "none")
        return ResidentWorker(engine, redis, artifacts)

    return build


@pytest.fixture
def run(
    store: JobStore, worker_for: Callable[[OnStep], ResidentWorker]
) -> Callable[..., JobRecord]:
    """Create a job, have a worker run it, and return its record."""

    def run_job(on_step: OnStep = lambda step: None, **changes: object) -> JobRecord:
        job = store.create(REQUEST.model_copy(update=changes), QUEUE).job
        worker_for(on_step).work(burst=True, logging_level="WARNING")
        return store.get(job.id)

    return run_job


def failing(error: BaseException) -> OnStep:
    def on_step(step: int) -> None:
        raise error

    return on_step


def rq_job(redis: Redis, job_id: str) -> Job:
    return Job.fetch(job_id, connection=redis, serializer=JSONSerializer)


def test_a_job_becomes_a_stored_video(
    run: Callable[..., JobRecord], artifacts: FolderArtifactStore, redis: Redis
) -> None:
    record = run()
    assert record.state is JobState.SUCCEEDED
    assert record.video is not None
    data = artifacts.path(record.video.key).read_bytes()
    assert re.fullmatch(rf"videos/{record.id}/1-[0-9a-f]{{8}}\.mp4", record.video.key)
    assert record.video.bytes == len(data)
    assert record.video.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.video.width, record.video.height, record.video.num_frames) == (64, 32, 9)
    assert rq_job(redis, record.id).get_status() is JobStatus.FINISHED


def test_the_same_request_gives_the_same_bytes(
    run: Callable[..., JobRecord], artifacts: FolderArtifactStore
) -> None:
    first, second = run().video, run().video
    assert first is not None
    assert second is not None
    for one, other in zip(first.keys, second.keys, strict=True):
        assert one != other
        assert artifacts.path(one).read_bytes() == artifacts.path(other).read_bytes()
    assert first.frames_sha256 == second.frames_sha256
    frames = np.full((9, 32, 64, 3), REQUEST.seed, np.uint8).tobytes()
    assert first.frames_sha256 == hashlib.sha256(b"rgb24 9 32 64\n" + frames).hexdigest()


def test_another_seed_gives_other_frames(run: Callable[..., JobRecord]) -> None:
    first, second = run().video, run(seed=REQUEST.seed + 1).video
    assert first is not None
    assert second is not None
    assert first.frames_sha256 != second.frames_sha256


def test_a_job_has_pictures_of_its_frames(
    store: JobStore, redis: Redis, each_artifacts_url: str, tmp_path: Path
) -> None:
    job = store.create(REQUEST, QUEUE).job
    artifacts = open_artifacts(each_artifacts_url)
    ResidentWorker(FakeEngine(), redis, artifacts).work(burst=True, logging_level="WARNING")
    video = store.get(job.id).video
    assert video is not None
    thumbnail, sheet = video.thumbnail, video.spritesheet
    assert thumbnail is not None
    assert sheet is not None
    assert {each.key for each in artifacts.list()} == set(video.keys)
    assert thumbnail.key == video.key.replace(".mp4", "-thumbnail.webp")
    assert sheet.key == video.key.replace(".mp4", "-spritesheet.webp")
    assert (thumbnail.width, thumbnail.height) == (sheet.frame_width, sheet.frame_height)
    assert (thumbnail.width, thumbnail.height) == (64, 32)
    assert (sheet.columns, sheet.rows, sheet.frames) == (3, 3, tuple(range(9)))
    for picture, size in ((thumbnail, (64, 32)), (sheet, (192, 96))):
        data = b"".join(artifacts.read(picture.key, 0, picture.bytes))
        assert artifacts.size(picture.key) == picture.bytes
        assert picture.sha256 == hashlib.sha256(data).hexdigest()
        path = tmp_path / "picture.webp"
        path.write_bytes(data)
        (pixels,) = decode_video(path, *size)
        assert np.abs(pixels.astype(int) - REQUEST.seed).max() <= 3, "the fake engine's colour"


def test_an_ffmpeg_without_webp_costs_the_pictures_and_not_the_job(
    run: Callable[..., JobRecord],
    artifacts: FolderArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = imageio_ffmpeg.get_ffmpeg_exe()
    wrapper = tmp_path / "ffmpeg"
    wrapper.write_text(
        "#!/bin/sh\n"
        'case "$*" in *libwebp*) echo "Unknown encoder" >&2; exit 8;; esac\n'
        f'exec {shlex.quote(real)} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(wrapper))
    record = run()
    assert record.state is JobState.SUCCEEDED
    assert record.video is not None
    assert (record.video.thumbnail, record.video.spritesheet) == (None, None)
    assert [each.key for each in artifacts.list()] == [record.video.key]
    said = [line for line in caplog.messages if "pictures" in line]
    assert said == ["the video has no pictures: ffmpeg ended with status 8: Unknown encoder"]


def test_an_engine_gets_the_owner_of_each_job(
    store: JobStore, redis: Redis, artifacts: FolderArtifactStore
) -> None:
    engine = FakeEngine()
    for owner in ("ann", "bob"):
        store.create(REQUEST, QUEUE, Submission(owner))
    ResidentWorker(engine, redis, artifacts).work(burst=True, logging_level="WARNING")
    assert engine.owners == ["ann", "bob"]


def test_the_seconds_of_a_job_add_up(run: Callable[..., JobRecord]) -> None:
    timings = run().timings
    assert timings is not None
    assert (timings.text_encoder_s, timings.denoise_s, timings.vae_s) == (0.5, 1.5, 0.25)
    assert timings.queue_s >= 0
    assert 0 < timings.mp4_s < timings.total_s


def test_the_file_names_what_made_it_but_not_the_prompt(
    run: Callable[..., JobRecord], artifacts: FolderArtifactStore
) -> None:
    record = run(prompt=SECRET)
    assert record.video is not None
    data = artifacts.path(record.video.key).read_bytes()
    for text in ("recipe-1", '"seed": 200', hashlib.sha256(SECRET.encode()).hexdigest()):
        assert text.encode() in data
    assert record.id.encode() not in data, "the same request gives the same file"
    assert SECRET.encode() not in data


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptTooLong("prompt has 99 tokens"), "prompt_too_long"),
        (GenerationFailed("it failed"), "generation_failed"),
        (torch.OutOfMemoryError("2 GiB wanted"), "out_of_device_memory"),
        (ZeroDivisionError("a bug"), "internal_error"),
        (DeserializationError("any library's error"), "internal_error"),
    ],
)
def test_a_failure_has_a_code_and_no_traceback(
    run: Callable[..., JobRecord], redis: Redis, error: Exception, code: str
) -> None:
    record = run(failing(error))
    assert record.state is JobState.FAILED
    assert record.failure is not None
    assert record.failure.code == code
    assert "Traceback" not in record.failure.detail
    assert "a bug" not in record.failure.detail
    # Delivered, and not delivered again.
    assert rq_job(redis, record.id).get_status() is JobStatus.FINISHED
    assert record.attempts == 1


def test_the_log_has_the_traceback_under_the_job_and_never_the_prompt(
    run: Callable[..., JobRecord], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        run(failing(ZeroDivisionError("a bug")), prompt=SECRET)
    assert "ZeroDivisionError: a bug" in caplog.text
    assert SECRET not in caplog.text


def test_the_time_limit_is_a_failure_of_its_own(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    redis.hset(redis_keys.record(job.id), "deadline_s", 1)
    worker_for(lambda step: time.sleep(0.4)).work(burst=True, logging_level="WARNING")
    failure = store.get(job.id).failure
    assert failure is not None
    assert failure.code == "generation_timed_out"
    assert "1 s" in failure.detail


def test_a_running_job_is_cancelled_between_two_steps(
    store: JobStore, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST.model_copy(update={"num_inference_steps": 1000}), QUEUE).job
    steps: list[int] = []

    def on_step(step: int) -> None:
        steps.append(step)
        time.sleep(0.01)
        if step == 3:
            store.cancel(job.id)

    worker_for(on_step).work(burst=True, logging_level="WARNING")
    record = store.get(job.id)
    assert record.state is JobState.CANCELLED
    assert record.video is None
    assert len(steps) < 30


def test_rq_can_stop_a_job_and_the_next_one_runs(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    stopped = store.create(REQUEST.model_copy(update={"num_inference_steps": 1000}), QUEUE).job
    after = store.create(REQUEST, QUEUE).job

    def on_step(step: int) -> None:
        if step == 2:
            send_stop_job_command(redis, stopped.id, serializer=JSONSerializer)
        time.sleep(0.01)

    worker_for(on_step).work(burst=True, logging_level="WARNING")
    assert store.get(stopped.id).state is JobState.CANCELLED
    assert store.get(after.id).state is JobState.SUCCEEDED


def test_a_job_that_has_ended_is_not_run_again(
    store: JobStore, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    attempt = store.claim(job.id, "w")
    store.cancelled(attempt)
    worker_for(failing(AssertionError("it ran"))).work(burst=True, logging_level="WARNING")
    assert store.get(job.id).state is JobState.CANCELLED


def take_over(redis: Redis, store: JobStore, job_id: str) -> None:
    """Do to a job what happens when its worker was silent for too long."""
    redis.hset(redis_keys.record(job_id), "lease_ms", 1)
    Recovery(redis).run()  # or the worker's own recovery thread, if that is first
    redis.delete(f"rq:queue:{QUEUE}")  # out of the queue, as a worker takes it
    store.claim(job_id, "other")


def test_a_stale_attempt_stops_and_writes_nothing(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST.model_copy(update={"num_inference_steps": 1000}), QUEUE).job
    steps: list[int] = []

    def on_step(step: int) -> None:
        steps.append(step)
        time.sleep(0.01)
        if step == 1:
            take_over(redis, store, job.id)

    worker_for(on_step).work(burst=True, logging_level="WARNING")
    assert len(steps) < 30
    record = store.get(job.id)
    assert record.state is JobState.RUNNING
    assert (record.attempts, record.worker) == (2, "other")
    assert record.video is None
    # RQ's hash belongs to the other attempt now.
    assert rq_job(redis, job.id).get_status() is not JobStatus.FINISHED


def test_a_job_that_another_worker_holds_is_left_to_it(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    held = store.claim(job.id, "other")
    worker_for(failing(AssertionError("it ran"))).work(burst=True, logging_level="WARNING")
    assert store.renew(held) is False
    assert store.get(job.id).attempts == 1


def test_a_record_that_cannot_be_read_ends_its_job(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    redis.hset(redis_keys.record(job.id), "lost", "many")
    worker_for(failing(AssertionError("it ran"))).work(burst=True, logging_level="WARNING")
    redis.hset(redis_keys.record(job.id), "lost", "0")
    record = store.get(job.id)
    assert record.state is JobState.FAILED
    assert record.failure is not None
    assert record.failure.code == "record_unreadable"
    assert "lost: " in record.failure.detail


def test_a_record_with_a_field_of_the_next_version_is_run(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    redis.hset(redis_keys.record(job.id), "field_of_the_next_version", "1")
    worker_for(lambda _: None).work(burst=True, logging_level="WARNING")
    assert store.get(job.id).state is JobState.SUCCEEDED
    assert redis.hget(redis_keys.record(job.id), "field_of_the_next_version") == b"1"


def test_a_record_of_another_format_is_left_to_another_worker(
    store: JobStore, redis: Redis, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    job = store.create(REQUEST, QUEUE).job
    redis.hset(redis_keys.record(job.id), "format", "2")
    worker_for(failing(AssertionError("it ran"))).work(burst=True, logging_level="WARNING")
    redis.hdel(redis_keys.record(job.id), "format")
    assert (store.get(job.id).state, store.get(job.id).attempts) == (JobState.QUEUED, 0)
    # In no queue, it is delivered again some seconds later.
    recovery = Recovery(redis)
    recovery.run()
    redis.hset(redis_keys.record(job.id), "missing_ms", 1)
    assert recovery.run() == {job.id: "queued"}


def test_a_claim_whose_answer_is_lost_is_made_once_and_its_job_is_run(
    store: JobStore, redis: Redis, artifacts: FolderArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.create(REQUEST, QUEUE).job
    claim, claims = JobStore.claim, list[str | None]()

    def lossy(self: JobStore, job_id: str, worker: str, token: str | None = None) -> Attempt:
        attempt = claim(self, job_id, worker, token)
        claims.append(token)
        if len(claims) == 1:
            raise RedisConnectionError("cut after it was made")
        return attempt

    monkeypatch.setattr(JobStore, "claim", lossy)
    ResidentWorker(FakeEngine(), redis, artifacts).work(burst=True, logging_level="WARNING")
    assert claims == [claims[0]] * 2
    record = store.get(job.id)
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)


class BrokenDevice(Device):
    def empty_cache(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")


def test_a_device_that_cannot_empty_its_cache_fails_the_job_and_ends_the_process(
    store: JobStore, redis: Redis, artifacts: FolderArtifactStore
) -> None:
    job, stats = store.create(REQUEST, QUEUE).job, WorkerStats()
    engine = FakeEngine(failing(torch.OutOfMemoryError("2 GiB wanted")))
    engine.device = BrokenDevice("cpu", "none")
    ResidentWorker(engine, redis, artifacts, stats).work(burst=True, logging_level="WARNING")
    failure = store.get(job.id).failure
    assert failure is not None
    assert failure.code == "out_of_device_memory"
    assert stats.exit_status == EXIT_DEVICE_LOST


class HangingDevice(Device):
    """A device whose memory query hangs once a job has started."""

    asked = threading.Event()
    answers = threading.Event()

    def memory(self) -> None:
        if self.asked.is_set():
            self.answers.wait(60)

    def is_lost(self, error: BaseException) -> bool:
        return True


def test_a_lost_device_that_hangs_when_it_is_asked_does_not_keep_the_worker(
    store: JobStore, redis: Redis, artifacts: FolderArtifactStore
) -> None:
    store.create(REQUEST, QUEUE)

    def lose(step: int) -> None:
        HangingDevice.asked.set()
        worker._heartbeat.refresh()
        time.sleep(0.5)  # the heartbeat's thread asks, and hangs
        raise RuntimeError("the device is gone")

    engine, stats = FakeEngine(lose), WorkerStats()
    engine.device = HangingDevice("npu", "none")
    worker = ResidentWorker(engine, redis, artifacts, stats)
    started = time.monotonic()
    worker.work(burst=True, logging_level="WARNING")
    assert time.monotonic() - started < 30
    assert stats.exit_status == EXIT_DEVICE_LOST
    HangingDevice.answers.set()
    worker._heartbeat._thread.join()


class InterferingStore(FolderArtifactStore):
    """A store that calls `then` each time a file has just been stored."""

    def __init__(self, root: Path, then: Callable[[], object]) -> None:
        super().__init__(root)
        self.then = then
        self.stored: list[Path] = []

    def put(
        self,
        key: str,
        source: Path,
        check: Callable[[], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        super().put(key, source, check, guard)
        self.stored.append(self.path(key))
        assert self.stored[-1].is_file()
        self.then()


def test_the_video_of_an_attempt_that_became_stale_is_deleted(
    store: JobStore, redis: Redis, tmp_path: Path
) -> None:
    job = store.create(REQUEST, QUEUE).job

    def then() -> None:
        if len(interfering.stored) == 1:
            take_over(redis, store, job.id)

    interfering = InterferingStore(tmp_path / "artifacts", then)
    ResidentWorker(FakeEngine(), redis, interfering).work(burst=True, logging_level="WARNING")
    assert store.get(job.id).state is JobState.RUNNING
    assert len(interfering.stored) == 3, "the video and two pictures"
    assert not any(path.exists() for path in interfering.stored)


def test_a_video_whose_pictures_cannot_be_stored_is_a_video(
    store: JobStore, redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = store.create(REQUEST, QUEUE).job

    def then() -> None:
        """Once the video is stored, put a folder where a picture has to go."""
        video = interfering.stored[0]
        video.with_name(f"{video.stem}-spritesheet.webp").mkdir(exist_ok=True)

    interfering = InterferingStore(tmp_path / "artifacts", then)
    ResidentWorker(FakeEngine(), redis, interfering).work(burst=True, logging_level="WARNING")
    record = store.get(job.id)
    assert record.state is JobState.SUCCEEDED
    assert record.video is not None
    assert interfering.path(record.video.key).is_file()
    assert (record.video.thumbnail, record.video.spritesheet) == (None, None)
    assert "the video has no pictures, because they could not be stored" in caplog.messages


def test_a_worker_is_offered_while_it_works_and_not_afterwards(
    redis: Redis, store: JobStore, worker_for: Callable[[OnStep], ResidentWorker]
) -> None:
    during: list[str] = []
    store.create(REQUEST, QUEUE)
    worker = worker_for(lambda step: during.extend(o.worker_id for o in catalog.read(redis).offers))
    worker.work(burst=True, logging_level="WARNING")
    assert set(during) == {worker.name}
    assert not worker.pubsub_thread.is_alive()
    assert catalog.read(redis).offers == ()


def test_outside_a_job_there_is_no_context() -> None:
    with pytest.raises(LookupError):
        JOB_CONTEXT.get()


def test_names_are_unique_and_equal_workers_share_a_queue(
    worker_for: Callable[[OnStep], ResidentWorker],
) -> None:
    one, two = worker_for(lambda step: None), worker_for(lambda step: None)
    assert one.name != two.name
    assert one.queue_names() == two.queue_names() == [QUEUE]


def test_the_threads_of_a_worker_end_with_it(run: Callable[..., JobRecord]) -> None:
    run()
    ours = {"lease", "watchdog", "recovery", "heartbeat"}
    assert not ours & {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("stale", [False, True])
def test_after_a_watchdogs_last_words_nothing_is_offered(
    store: JobStore, redis: Redis, artifacts: FolderArtifactStore, stale: bool
) -> None:
    """Its process ends: no request may be accepted because of it, and another takes its job."""
    attempt = store.claim(store.create(REQUEST, QUEUE).job.id, "w")
    context = ResidentWorker(FakeEngine(), redis, artifacts)._context
    catalog.publish(redis, offer_of(context.worker))
    if stale:
        take_over(redis, store, attempt.job_id)
    watchdog(context, attempt)._on_hang()
    assert catalog.read(redis).offers == ()
    assert read_statuses(redis) == ()
    assert store.get(attempt.job_id).state is (JobState.RUNNING if stale else JobState.QUEUED)


def offer_of(worker: str) -> WorkerOffer:
    return WorkerOffer(
        worker_id=worker,
        queue=QUEUE,
        device="cpu",
        model=FakeEngine.model,
        modes=FakeEngine.modes,
        started_at=datetime.now(UTC),
    )
