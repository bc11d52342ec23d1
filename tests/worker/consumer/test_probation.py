"""Test that a worker at fault gives its job back, and takes no other until it has proven itself."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import imageio_ffmpeg
import pytest
from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.known_store import open_known_artifacts
from jobs.errors import WorkerUnfit
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import MAX_RETURNED
from jobs.store.workers import WorkerStatus, read_statuses
from tests.support.worker_processes import QUEUE, REQUEST
from worker.consumer import probation
from worker.consumer.probation import PAUSES, Probation
from worker.consumer.rq_worker import ResidentWorker
from worker.consumer.serve import ServeContext, serve
from worker.engine.fake_engine import FakeEngine, OnStep
from worker.errors import EXIT_UNFIT
from worker.job import fitness
from worker.job.fitness import check_fitness
from worker.process.drain import Drain
from worker.process.logs import WorkerIds
from worker.process.stats import FAULT_LIMIT, WorkerStats
from worker.settings import WorkerSettings

REAL_FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this test's workers make their scratch folders."""
    folder = tmp_path / "scratch-parent"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that replaces ffmpeg by a shell script; `$REAL` is the real one."""
    path = tmp_path / "ffmpeg"

    def replace(script: str) -> None:
        path.write_text(f"#!/bin/sh\nREAL={shlex.quote(REAL_FFMPEG)}\n{script}\n")
        path.chmod(0o755)

    replace('exec "$REAL" "$@"')
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    return replace


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probation, "PAUSES", type(PAUSES)(cap=0.01, base=0.001))


class Served:
    """One worker's `serve` in this thread, ended by its engine or by its faults."""

    def __init__(self, redis: Redis, store: JobStore, artifacts: Path) -> None:
        self.redis, self.store = redis, store
        self.stats, self.drain = WorkerStats(), Drain()
        self.artifacts = FolderArtifactStore(artifacts)

    def run_one(self, on_step: OnStep = lambda step: None) -> JobRecord:
        """Run one new job once, on a worker with these stats."""
        job = self.store.create(REQUEST, QUEUE).job
        self.work(on_step)
        return self.store.get(job.id)

    def work(self, on_step: OnStep = lambda step: None) -> None:
        ResidentWorker(
            FakeEngine(on_step), self.redis, self.artifacts, self.stats, self.drain
        ).work(burst=True, logging_level="WARNING")


@pytest.fixture
def served(redis: Redis, store: JobStore, tmp_path: Path) -> Served:
    return Served(redis, store, tmp_path / "artifacts")


def at_last_step(then: Callable[[], object]) -> OnStep:
    def on_step(step: int) -> None:
        if step == REQUEST.num_inference_steps:
            then()

    return on_step


def remove_scratch(parent: Path) -> None:
    for each in parent.glob("wan-worker-*"):
        shutil.rmtree(each)


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "ffmpeg ended with status 1: it said nothing."),
        ("echo 'Unknown encoder libx264' >&2; exit 8", "status 8: Unknown encoder libx264."),
        ('"$REAL" "$@"; exit 1', "ffmpeg ended with status 1: it said nothing."),
        ("kill -9 $$", "ffmpeg was killed by signal 9: it said nothing."),
        ("cat > /dev/null; kill -11 $$", "ffmpeg was killed by signal 11: it said nothing."),
    ],
    ids=["false", "no-encoder", "after-the-last-frame", "killed", "crashed-at-the-end"],
)
def test_a_job_whose_ffmpeg_fails_goes_back_to_its_queue(
    served: Served, ffmpeg: Callable[[str], None], script: str, said: str
) -> None:
    record = served.run_one(at_last_step(lambda: ffmpeg(script)))
    assert (record.state, record.attempts, record.lost) == (JobState.QUEUED, 1, 0)
    assert record.failure is None
    rq_job = Job.fetch(record.id, connection=served.redis, serializer=JSONSerializer)
    assert rq_job.get_status() is JobStatus.QUEUED, "RQ's hash belongs to the next delivery"
    assert served.stats.fault is not None
    assert said in served.stats.fault
    ffmpeg('exec "$REAL" "$@"')
    served.work()
    ended = served.store.get(record.id)
    assert (ended.state, ended.attempts, ended.lost) == (JobState.SUCCEEDED, 2, 0)
    assert not served.stats.fault
    assert served.stats.faults == 0


@pytest.mark.parametrize(
    "error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO, errno.EDQUOT]
)
def test_what_the_system_refuses_is_the_workers_fault(served: Served, error: int) -> None:
    record = served.run_one(at_last_step(lambda: refuse(error)))
    assert (record.state, record.lost) == (JobState.QUEUED, 0)
    assert served.stats.fault is not None
    assert os.strerror(error) in served.stats.fault


def test_a_scratch_folder_that_is_removed_costs_one_attempt_and_is_made_again(
    served: Served, parent: Path
) -> None:
    record = served.run_one(at_last_step(lambda: remove_scratch(parent)))
    assert (record.state, record.attempts) == (JobState.QUEUED, 1)
    served.work()
    assert served.store.get(record.id).state is JobState.SUCCEEDED
    assert list(parent.iterdir()) == [], "the new folder is gone with its worker"


def test_a_removed_temporary_folder_is_made_again(served: Served, parent: Path) -> None:
    record = served.run_one(at_last_step(lambda: shutil.rmtree(parent)))
    assert record.state is JobState.QUEUED
    served.work()
    assert served.store.get(record.id).state is JobState.SUCCEEDED


def test_the_other_jobs_stay_in_the_queue(served: Served, ffmpeg: Callable[[str], None]) -> None:
    jobs = [served.store.create(REQUEST, QUEUE).job.id for _ in range(3)]
    served.work(at_last_step(lambda: ffmpeg("exit 1")))
    assert [served.store.get(each).attempts for each in jobs] == [1, 0, 0]


def test_a_job_that_workers_keep_giving_back_is_failed_with_the_reason(
    served: Served, ffmpeg: Callable[[str], None]
) -> None:
    job = served.store.create(REQUEST, QUEUE).job.id
    for number in range(1, MAX_RETURNED + 1):
        served.stats = WorkerStats()  # another worker each time
        ffmpeg('exec "$REAL" "$@"')
        served.work(at_last_step(lambda: ffmpeg("exit 3")))
        record = served.store.get(job)
        assert record.attempts == number
        expected = JobState.FAILED if number == MAX_RETURNED else JobState.QUEUED
        assert record.state is expected
    assert record.failure is not None
    assert record.failure.code == "worker_unfit"
    assert "5 times" in record.failure.detail
    assert "ffmpeg ended with status 3" in record.failure.detail
    assert record.lost == 0
    counters = cast("dict[bytes, bytes]", served.redis.hgetall(redis_keys.METRICS))
    counted = {name.split(b"|")[0]: float(value) for name, value in counters.items()}
    assert counted[b"returned"] == MAX_RETURNED
    assert not {b"lost", b"released"} & counted.keys()


def test_a_job_that_is_cancelled_while_its_worker_fails_is_cancelled(served: Served) -> None:
    job = served.store.create(REQUEST, QUEUE).job.id

    def cancel_and_fail() -> None:
        served.store.cancel(job)
        refuse(errno.ENOSPC)

    served.work(at_last_step(cancel_and_fail))
    assert served.store.get(job).state is JobState.CANCELLED


def test_a_worker_that_cannot_prove_itself_offers_nothing_and_ends_with_its_own_status(
    served: Served,
    redis: Redis,
    tmp_path: Path,
    ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for a job that it does not take, and shows why."""
    job = served.store.create(REQUEST, QUEUE).job.id
    ffmpeg("exit 1")
    seen: list[WorkerStatus] = []
    offers: list[int] = []
    real = Probation._pause

    def look(self: Probation) -> bool:
        seen.extend(read_statuses(redis))
        offers.append(len(catalog.read(redis).offers))
        return real(self)

    monkeypatch.setattr(Probation, "_pause", look)
    settings = WorkerSettings(artifacts_url=(tmp_path / "artifacts").as_uri())
    context = ServeContext(FakeEngine(), redis, FolderArtifactStore(tmp_path / "artifacts"))
    assert serve(context, settings, WorkerIds()) == EXIT_UNFIT
    assert served.store.get(job).attempts == 0
    assert set(offers) == {0}
    assert len(offers) == FAULT_LIMIT, "one pause after each fault"
    assert {status.state for status in seen} == {"degraded"}
    assert seen[0].fault == "ffmpeg ended with status 1: it said nothing."


def test_a_store_that_is_missing_keeps_a_worker_out_of_service(
    served: Served, redis: Redis, tmp_path: Path
) -> None:
    """Each video would be made, waited for half a minute, and given back."""
    folder = tmp_path / "share"
    known = open_known_artifacts(folder.as_uri(), redis)
    known.verify()
    away = folder.rename(tmp_path / "away")
    folder.mkdir()
    probation = Probation(served.stats, served.drain, known)
    with ExitStack() as opened:
        assert probation.prove(opened) is None
        assert "artifact store is missing" in str(served.stats.fault)
        folder.rmdir()
        away.rename(folder)
        assert probation.prove(opened) is not None
    assert not served.stats.fault


def test_the_offer_comes_back_once_the_fault_is_mended(
    served: Served, redis: Redis, ffmpeg: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = served.store.create(REQUEST, QUEUE).job.id
    ffmpeg("exit 1")

    def mend(self: Probation) -> bool:
        ffmpeg('exec "$REAL" "$@"')
        return True

    monkeypatch.setattr(Probation, "_pause", mend)
    during: list[tuple[str, str | None]] = []

    def look(step: int) -> None:
        wait_until(lambda: len(catalog.read(redis).offers) == 1)
        wait_until(lambda: read_statuses(redis)[0].state == "busy")
        during.extend((s.state, s.fault) for s in read_statuses(redis))

    served.work(look)
    assert served.store.get(job).state is JobState.SUCCEEDED
    assert set(during) == {("busy", None)}


def test_a_worker_that_is_told_to_stop_does_not_wait_for_its_proof(
    served: Served, ffmpeg: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg("exit 1")
    monkeypatch.setattr(probation, "PAUSES", type(PAUSES)(cap=3600.0, base=3600.0))
    thread = threading.Thread(target=served.work)
    monkeypatch.setattr(ResidentWorker, "_install_signal_handlers", lambda self: None)
    thread.start()
    wait_until(lambda: served.stats.fault is not None)
    served.drain.request_stop()
    thread.join(30)
    assert not thread.is_alive()


def test_successes_in_between_make_faults_not_in_a_row(
    served: Served, ffmpeg: Callable[[str], None]
) -> None:
    for _ in range(FAULT_LIMIT + 1):
        served.run_one(at_last_step(lambda: ffmpeg("exit 1")))
        ffmpeg('exec "$REAL" "$@"')
        served.work()
    assert served.stats.exit_status is None


def test_faults_in_jobs_end_the_process_though_each_proof_succeeds(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, FAULT_LIMIT + 1):
        assert served.stats.exit_status is None, number
        served.run_one(at_last_step(lambda: refuse(errno.ENOSPC)))
    assert served.stats.exit_status == EXIT_UNFIT


def test_the_pauses_grow_with_the_faults() -> None:
    for faults in range(1, 6):
        least, most = 0.5 * 2 ** (faults - 1), 0.5 * 2**faults
        assert all(least <= PAUSES.compute(faults) <= most for _ in range(20))
    assert PAUSES.compute(50) <= 30


def test_each_pause_is_that_of_the_faults_so_far(
    served: Served, ffmpeg: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Pauses:
        def compute(self, faults: int) -> float:
            asked.append(faults)
            return 0.0

    monkeypatch.setattr(probation, "PAUSES", Pauses())
    ffmpeg("exit 1")
    served.work()
    assert asked == list(range(1, FAULT_LIMIT + 1))


def test_a_proof_does_not_wait_for_an_ffmpeg_that_hangs(
    tmp_path: Path, ffmpeg: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitness, "TIMEOUT_S", 0.2)
    ffmpeg("exec sleep 600")
    with pytest.raises(WorkerUnfit, match="a few frames within"):
        check_fitness(tmp_path, 0)


def test_memory_that_runs_out_in_one_job_is_that_jobs_failure(served: Served) -> None:
    def exhaust() -> None:
        raise MemoryError

    record = served.run_one(at_last_step(exhaust))
    assert record.failure is not None
    assert record.failure.code == "out_of_device_memory"
    assert served.stats.fault is None


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@needs_mount
def test_a_full_scratch_disk_is_noticed_and_so_is_room_again(served: Served, parent: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(parent)]
    subprocess.run(mount, check=True)
    try:
        filler = parent / "filler"

        def fill() -> None:
            with suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(bytes(4096))

        record = served.run_one(at_last_step(fill))
        assert record.state is JobState.QUEUED
        with ExitStack() as opened:
            assert Probation(served.stats, served.drain, served.artifacts).prove(opened) is None
        assert served.stats.fault is not None
        assert "No space left on device" in served.stats.fault
        filler.unlink()
        check_fitness(parent, 1024 * 1024)
        with pytest.raises(WorkerUnfit, match="No space left on device"):
            check_fitness(parent, 5 * 1024 * 1024)  # as large a video needs twice its size
        served.work()
        assert served.store.get(record.id).state is JobState.SUCCEEDED
    finally:
        subprocess.run(["umount", str(parent)], check=True)
