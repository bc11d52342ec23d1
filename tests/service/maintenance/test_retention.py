"""What is past its time is deleted, videos first; everything else stays."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.store import ArtifactStore, artifact_key, open_artifacts
from jobs.errors import ArtifactsUnavailable, JobNotFound
from jobs.record import Attempt, Failure, JobRecord, StageTimings, Video, now
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.retention_index import PAGE, Aging
from service.maintenance import retention
from service.maintenance.retention import Retention, RetentionBusy, sweep_deletions
from service.schemas.expiry import BEFORE_REDIS, Keep
from service.settings import ServiceSettings

DAY = timedelta(days=1)
MOMENT = timedelta(seconds=1)
KEEP = Keep(videos=7 * DAY, jobs=20 * DAY, orphans=DAY)
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)
NEVER = threading.Event()


@dataclass
class House:
    """A service's jobs and files, and how they come about."""

    redis: Redis
    store: JobStore
    artifacts: ArtifactStore
    retention: Retention
    request: GenerationRequest
    folder: Path

    def queued(self) -> JobRecord:
        return self.store.create(self.request, "q").job

    def claimed(self) -> Attempt:
        """Taken out of the queue, as a worker does it, and begun."""
        job = self.queued()
        self.redis.lrem("rq:queue:q", 1, job.id)
        return self.store.claim(job.id, "w")

    def running(self) -> tuple[Attempt, Video]:
        """A running attempt that has stored its video and not said so yet."""
        attempt = self.claimed()
        key = artifact_key(attempt.job_id, attempt.label)
        self.put(key)
        return attempt, Video(
            key=key, bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8
        )

    def succeeded(self) -> JobRecord:
        attempt, video = self.running()
        self.store.succeed(attempt, video, TIMINGS)
        return self.store.get(attempt.job_id)

    def put(self, key: str) -> None:
        source = self.folder / "made.mp4"
        source.write_bytes(b"mp4")
        self.artifacts.put(key, source)

    def stored(self) -> set[str]:
        return {each.key for each in self.artifacts.list()}

    def sweep(self, after: timedelta) -> dict[str, int]:
        """Run a round as if that much time had passed."""
        return {kind: n for kind, n in self.retention.run(NEVER, now() + after).items() if n}


@pytest.fixture
def make_house(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest, tmp_path: Path
) -> Callable[[str], House]:
    def make(artifacts_url: str) -> House:
        artifacts = open_artifacts(artifacts_url)
        retention = Retention(redis, artifacts, KEEP)
        return House(redis, store, artifacts, retention, request_for_video, tmp_path)

    return make


@pytest.fixture
def house(make_house: Callable[[str], House], settings: ServiceSettings) -> House:
    """Over the folder that the service of `client` serves."""
    return make_house(settings.artifacts_url)


def test_a_video_goes_when_its_time_is_over_and_its_record_says_so(
    make_house: Callable[[str], House], each_artifacts_url: str
) -> None:
    house = make_house(each_artifacts_url)
    job = house.succeeded()
    assert job.video is not None

    assert house.sweep(KEEP.videos - 60 * MOMENT) == {}
    assert house.stored() == {job.video.key}

    assert house.sweep(KEEP.videos + 60 * MOMENT) == {"videos": 1}
    assert house.stored() == set()
    kept = house.store.get(job.id)
    assert kept.video_deleted_at is not None
    assert kept.model_copy(update={"video_deleted_at": None}) == job
    assert house.sweep(KEEP.videos + DAY) == {}, "a deleted video is not deleted again"


def test_callers_see_when_a_video_ends_and_that_it_has(house: House, client: TestClient) -> None:
    job = house.succeeded()
    assert job.finished_at is not None

    before = client.get(f"/jobs/{job.id}").json()["video"]
    # The service's own settings keep videos for 168 hours.
    assert datetime.fromisoformat(before["expires_at"]) == job.finished_at + 7 * DAY
    assert before["deleted_at"] is None
    assert client.get(before["url"]).status_code == 200

    house.sweep(KEEP.videos + MOMENT)
    after = client.get(f"/jobs/{job.id}").json()["video"]
    assert datetime.fromisoformat(after["deleted_at"]) <= now()
    answer = client.get(before["url"])
    assert (answer.status_code, answer.json()["code"]) == (410, "video_gone")
    assert "its time was over" in answer.json()["detail"]


def test_a_record_goes_with_everything_that_belongs_to_it(
    make_house: Callable[[str], House], each_artifacts_url: str
) -> None:
    house = make_house(each_artifacts_url)
    succeeded = house.succeeded()
    attempt = house.claimed()
    house.store.fail(attempt, Failure(code="out_of_device_memory", detail="No room."))
    cancelled = house.store.cancel(house.queued().id)

    assert house.sweep(KEEP.jobs + MOMENT) == {"jobs": 3}
    assert house.stored() == set()
    for job_id in (succeeded.id, attempt.job_id, cancelled.id):
        with pytest.raises(JobNotFound):
            house.store.get(job_id)
    assert left_of_jobs(house.redis) == []


def left_of_jobs(redis: Redis) -> list[str]:
    """Keys that grow with the number of jobs."""
    fixed = (redis_keys.METRICS, redis_keys.RETENTION_DONE, "rq:queues")
    names = sorted(name.decode() for name in redis.scan_iter())
    return [name for name in names if name not in fixed]


def test_neither_running_nor_just_finished_jobs_are_touched_however_old(house: House) -> None:
    attempt, video = house.running()
    waiting = house.queued()
    late = house.succeeded()
    assert late.video is not None
    later = now() + 25 * DAY
    house.redis.hset(redis_keys.record(late.id), "finished_at", later.isoformat())

    assert house.sweep(25 * DAY + MOMENT) == {}
    assert house.stored() == {video.key, late.video.key}
    assert house.store.get(waiting.id).state is JobState.QUEUED
    house.store.succeed(attempt, video, TIMINGS)
    assert house.store.get(late.id).video_deleted_at is None


def test_records_go_before_redis_drops_them_so_that_their_videos_go_first(house: House) -> None:
    running, video = house.running()
    waiting = house.queued()
    late = house.succeeded()
    just_before = timedelta(seconds=redis_keys.RECORD_TTL_S) - BEFORE_REDIS + MOMENT
    house.redis.hset(redis_keys.record(late.id), "finished_at", (now() + just_before).isoformat())

    assert house.sweep(just_before) == {"jobs": 2}
    assert house.stored() == {video.key}
    for gone in (waiting.id, late.id):
        with pytest.raises(JobNotFound):
            house.store.get(gone)
    assert house.store.get(running.job_id).state is JobState.RUNNING


def test_files_that_no_record_names_go_after_a_day(
    make_house: Callable[[str], House], each_artifacts_url: str
) -> None:
    house = make_house(each_artifacts_url)
    lost, video = house.running()
    house.store.give_up(lost)
    second = house.store.claim(lost.job_id, "w")
    second_key = artifact_key(second.job_id, second.label)
    house.put(second_key)
    forgotten = artifact_key("0123456789ab0123", "1")
    house.put(forgotten)
    foreign = ("videos/readme.txt", "videos/x/1.mp4.bak", "backup/x/1.mp4")
    for key in foreign:
        house.put(key)

    assert house.sweep(KEEP.orphans - 60 * MOMENT) == {}
    # While the job runs, either attempt's video may still be the one.
    assert house.sweep(KEEP.orphans + 60 * MOMENT) == {"orphans": 1}
    assert house.stored() == {video.key, second_key, *foreign}
    house.store.succeed(second, video.model_copy(update={"key": second_key}), TIMINGS)
    assert house.sweep(KEEP.orphans + 60 * MOMENT) == {"orphans": 1}
    assert house.stored() == {second_key, *foreign}


def test_an_empty_redis_makes_no_orphans(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.succeeded()
    house.redis.flushall()
    assert house.sweep(300 * DAY) == {}
    assert len(house.stored()) == 1
    assert "Redis knows of no job at all" in caplog.text


def test_unfinished_files_go_a_day_later(house: House, settings: ServiceSettings) -> None:
    job = house.succeeded()
    folder = Path(settings.artifacts_url.removeprefix("file://"), "videos", job.id)
    stale, fresh = folder / ".incoming-stale", folder / ".incoming-fresh"
    for file in (stale, fresh):
        file.write_bytes(b"half")
    os.utime(stale, times=(0, 0))
    assert house.sweep(timedelta()) == {"leftovers": 1}
    assert not stale.exists()
    assert fresh.exists()


def test_one_process_at_a_time_and_once_in_an_hour(house: House) -> None:
    house.succeeded()
    with house.redis.lock(redis_keys.RETENTION_LOCK, timeout=60):
        with pytest.raises(RetentionBusy):
            house.sweep(KEEP.jobs + MOMENT)
        house.retention.run_if_due(NEVER)
        assert not house.redis.exists(redis_keys.RETENTION_DONE)
    house.retention.run_if_due(NEVER)
    assert 0 < house.redis.ttl(redis_keys.RETENTION_DONE) <= retention.EVERY.total_seconds()
    assert not house.redis.exists(redis_keys.RETENTION_LOCK)


def test_a_round_that_is_cut_off_does_not_count_as_done(house: House) -> None:
    house.succeeded()
    ending = threading.Event()
    ending.set()
    assert house.retention.run(ending, now() + KEEP.jobs + MOMENT).total() == 0
    assert not house.redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)
    assert house.sweep(KEEP.jobs + MOMENT) == {"jobs": 1}


def test_a_record_outlives_its_video(
    house: House, unused_port: int, bucket: str, redis: Redis
) -> None:
    """A store that is away: the record, without which nobody would find the video, stays."""
    job = house.succeeded()
    away = open_artifacts(f"s3://{bucket}/wan?endpoint=http://127.0.0.1:{unused_port}")
    with pytest.raises(ArtifactsUnavailable):
        Retention(redis, away, KEEP).run(NEVER, now() + KEEP.jobs + MOMENT)
    assert house.store.get(job.id) == job
    assert not redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)


def test_names_of_records_that_redis_dropped_leave_every_index(house: House) -> None:
    job = house.queued()
    house.redis.delete(redis_keys.record(job.id))
    house.sweep(timedelta(seconds=redis_keys.RECORD_TTL_S) + MOMENT)
    assert list(house.redis.scan_iter(f"{redis_keys.INDEX_PREFIX}*")) == []


def test_a_record_that_cannot_be_read_is_left_alone(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = house.succeeded(), house.succeeded()
    assert broken.video is not None
    house.redis.hset(redis_keys.record(broken.id), "finished_at", "secret nonsense")
    assert house.sweep(KEEP.jobs + MOMENT) == {"jobs": 1}
    assert house.redis.exists(redis_keys.record(broken.id))
    assert house.stored() == {broken.video.key}
    assert broken.id in caplog.text
    assert sound.id not in caplog.text
    assert "secret" not in caplog.text


def test_many_jobs_are_read_page_by_page(house: House) -> None:
    many = 3 * PAGE + 1
    for _ in range(many):
        house.store.cancel(house.queued().id)
    fresh = house.succeeded()
    house.redis.hset(redis_keys.record(fresh.id), "finished_at", (now() + KEEP.jobs).isoformat())
    assert house.sweep(KEEP.jobs + MOMENT) == {"jobs": many}
    assert [job.id for job in house.store.list().jobs] == [fresh.id]


def test_jobs_deleted_while_they_ran_go_once_they_have_ended(
    make_house: Callable[[str], House], each_artifacts_url: str
) -> None:
    house = make_house(each_artifacts_url)
    attempt, video = house.running()
    assert not house.store.purge(attempt.job_id)
    sweep_deletions(house.redis, house.artifacts, NEVER)
    assert house.stored() == {video.key}, "its attempt is still at work"

    house.store.succeed(attempt, video, TIMINGS)
    sweep_deletions(house.redis, house.artifacts, NEVER)
    assert house.stored() == set()
    assert left_of_jobs(house.redis) == []


def test_what_is_noted_of_a_video_makes_no_record(house: House) -> None:
    job = house.succeeded()
    house.store.purge(job.id)
    assert house.redis.exists(redis_keys.record(job.id)) == 0
    Aging(house.redis).video_deleted(job.id)
    assert house.redis.exists(redis_keys.record(job.id)) == 0


def test_a_round_tells_what_it_deleted(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.succeeded()
    with caplog.at_level(logging.INFO, logger="service.maintenance.retention"):
        house.sweep(timedelta())
        assert caplog.text == "", "a round that found nothing says nothing"
        house.sweep(KEEP.videos + MOMENT)
    assert "videos: 1, jobs with their videos: 0" in caplog.text


def test_one_file_that_cannot_be_deleted_does_not_keep_the_others(house: House) -> None:
    odd, sound = house.succeeded(), house.succeeded()
    assert odd.video is not None
    outside = odd.video.model_copy(update={"key": "../outside.mp4"})
    house.redis.hset(redis_keys.record(odd.id), "video", outside.model_dump_json())

    with pytest.raises(ArtifactsUnavailable, match=r"1 that are due .*\.\./outside\.mp4"):
        house.sweep(KEEP.videos + MOMENT)
    assert house.store.get(sound.id).video_deleted_at is not None
    assert house.store.get(odd.id).video_deleted_at is None
    assert not house.redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)
