"""Test retention: what is past its time is deleted, videos first, and everything else stays."""

import json
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

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.artifacts.known_store import open_known_artifacts
from jobs.artifacts.store import (
    ArtifactStore,
    artifact_key,
    open_artifacts,
    spritesheet_key,
    thumbnail_key,
)
from jobs.errors import ArtifactsUnavailable, JobNotFound
from jobs.record import (
    Attempt,
    Failure,
    JobRecord,
    Picture,
    Spritesheet,
    StageTimings,
    Video,
    now,
)
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.retention_index import PAGE, RetentionIndex
from service.maintenance import retention
from service.maintenance.retention import Retention, RetentionBusy, run_requested_deletions
from service.maintenance.retention_clock import ClockRefused, RetentionClock
from service.schemas.expiry import BEFORE_REDIS, RetentionPeriods
from service.settings import ServiceSettings

DAY = timedelta(days=1)
MOMENT = timedelta(seconds=1)
PERIODS = RetentionPeriods(videos=7 * DAY, jobs=20 * DAY, orphans=DAY)
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)
NEVER = threading.Event()


@dataclass
class Scenario:
    """The jobs and files of a service, and methods that make some."""

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
        """A running attempt that has stored its video, which its record does not name yet."""
        attempt = self.claimed()
        key = artifact_key(attempt.job_id, attempt.label)
        self.put(key)
        return attempt, Video(
            key=key, bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8
        )

    def with_pictures(self, attempt: Attempt, video: Video) -> Video:
        """The video with a thumbnail and a spritesheet, which are stored."""
        keys = [make(attempt.job_id, attempt.label) for make in (thumbnail_key, spritesheet_key)]
        for key in keys:
            self.put(key)
        file = {"bytes": 3, "sha256": "ab", "width": 96, "height": 96}
        grid = {"columns": 1, "rows": 1, "frame_width": 96, "frame_height": 96, "frames": (0,)}
        pictures = {
            "thumbnail": Picture(key=keys[0], **file),
            "spritesheet": Spritesheet(key=keys[1], **file, **grid),
        }
        return video.model_copy(update=pictures)

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

    def run_round(self, after: timedelta) -> dict[str, int]:
        """Run a round as if that much time had passed."""
        return {kind: n for kind, n in self.retention.run(NEVER, now() + after).items() if n}


@pytest.fixture
def make_scenario(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest, tmp_path: Path
) -> Callable[[str], Scenario]:
    def make(artifacts_url: str) -> Scenario:
        artifacts = open_artifacts(artifacts_url)
        retention = Retention(redis, artifacts, PERIODS)
        return Scenario(redis, store, artifacts, retention, request_for_video, tmp_path)

    return make


@pytest.fixture
def scenario(make_scenario: Callable[[str], Scenario], settings: ServiceSettings) -> Scenario:
    """Over the folder that the service of `client` serves."""
    return make_scenario(settings.artifacts_url)


def test_a_video_goes_when_its_time_is_over_and_its_record_says_so(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    scenario = make_scenario(each_artifacts_url)
    job = scenario.succeeded()
    assert job.video is not None

    assert scenario.run_round(PERIODS.videos - 60 * MOMENT) == {}
    assert scenario.stored() == {job.video.key}

    assert scenario.run_round(PERIODS.videos + 60 * MOMENT) == {"videos": 1}
    assert scenario.stored() == set()
    kept = scenario.store.get(job.id)
    assert kept.video_deleted_at is not None
    assert kept.model_copy(update={"video_deleted_at": None}) == job
    assert scenario.run_round(PERIODS.videos + DAY) == {}, "a deleted video is not deleted again"


def test_pictures_go_with_their_video(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    scenario = make_scenario(each_artifacts_url)
    attempt, video = scenario.running()
    pictured = scenario.with_pictures(attempt, video)
    scenario.store.succeed(attempt, pictured, TIMINGS)
    old = scenario.succeeded()
    assert old.video is not None

    # They are old enough to be orphans, but the record names them.
    assert scenario.run_round(PERIODS.videos - 60 * MOMENT) == {}
    assert scenario.stored() == {*pictured.keys, old.video.key}
    assert scenario.run_round(PERIODS.videos + 60 * MOMENT) == {"videos": 2}
    assert scenario.stored() == set()


def test_pictures_that_no_record_names_are_orphans(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    """A worker that died after it had stored the pictures, and another that stored none."""
    scenario = make_scenario(each_artifacts_url)
    lost, video = scenario.running()
    scenario.with_pictures(lost, video)
    scenario.store.give_up(lost)
    second = scenario.store.claim(lost.job_id, "w")
    second_key = artifact_key(second.job_id, second.label)
    scenario.put(second_key)
    foreign = ("videos/x/1-poster.webp", "videos/x/1.webp", "videos/x/thumbnail.webp")
    for key in foreign:
        scenario.put(key)

    assert scenario.run_round(PERIODS.orphans + 60 * MOMENT) == {}, "the job may still end so"
    scenario.store.succeed(second, video.model_copy(update={"key": second_key}), TIMINGS)
    assert scenario.run_round(PERIODS.orphans + 60 * MOMENT) == {"orphans": 3}
    assert scenario.stored() == {second_key, *foreign}


def test_callers_see_when_a_video_ends_and_that_it_has(
    scenario: Scenario, client: TestClient
) -> None:
    job = scenario.succeeded()
    assert job.finished_at is not None

    before = client.get(f"/jobs/{job.id}").json()["video"]
    # The service's own settings keep videos for 168 hours.
    assert datetime.fromisoformat(before["expires_at"]) == job.finished_at + 7 * DAY
    assert before["deleted_at"] is None
    assert client.get(before["url"]).status_code == 200

    # The service's own round at its start may still be running.
    wait_until(lambda: not scenario.redis.exists(redis_keys.RETENTION_LOCK))
    scenario.run_round(PERIODS.videos + MOMENT)
    after = client.get(f"/jobs/{job.id}").json()["video"]
    assert datetime.fromisoformat(after["deleted_at"]) <= now()
    answer = client.get(before["url"])
    assert (answer.status_code, answer.json()["code"]) == (410, "video_gone")
    assert "its time was over" in answer.json()["detail"]


def test_a_record_goes_with_everything_that_belongs_to_it(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    scenario = make_scenario(each_artifacts_url)
    succeeded = scenario.succeeded()
    attempt = scenario.claimed()
    scenario.store.fail(attempt, Failure(code="out_of_device_memory", detail="No room."))
    cancelled = scenario.store.cancel(scenario.queued().id)

    assert scenario.run_round(PERIODS.jobs + MOMENT) == {"jobs": 3}
    assert scenario.stored() == set()
    for job_id in (succeeded.id, attempt.job_id, cancelled.id):
        with pytest.raises(JobNotFound):
            scenario.store.get(job_id)
    assert left_of_jobs(scenario.redis) == []


def left_of_jobs(redis: Redis) -> list[str]:
    """Keys that grow with the number of jobs."""
    fixed = (redis_keys.METRICS, redis_keys.RETENTION_DONE, "rq:queues")
    names = sorted(name.decode() for name in redis.scan_iter())
    # Hours of counts, of which there are a week's at most.
    counts = redis_keys.SERIES_PREFIX
    return [name for name in names if name not in fixed and not name.startswith(counts)]


def test_neither_running_nor_just_finished_jobs_are_touched_however_old(scenario: Scenario) -> None:
    attempt, video = scenario.running()
    waiting = scenario.queued()
    late = scenario.succeeded()
    assert late.video is not None
    later = now() + 25 * DAY
    scenario.redis.hset(redis_keys.record(late.id), "finished_at", later.isoformat())

    assert scenario.run_round(25 * DAY + MOMENT) == {}
    assert scenario.stored() == {video.key, late.video.key}
    assert scenario.store.get(waiting.id).state is JobState.QUEUED
    scenario.store.succeed(attempt, video, TIMINGS)
    assert scenario.store.get(late.id).video_deleted_at is None


def test_records_go_before_redis_drops_them_so_that_their_videos_go_first(
    scenario: Scenario,
) -> None:
    running, video = scenario.running()
    waiting = scenario.queued()
    late = scenario.succeeded()
    just_before = timedelta(seconds=redis_keys.RECORD_TTL_S) - BEFORE_REDIS + MOMENT
    scenario.redis.hset(
        redis_keys.record(late.id), "finished_at", (now() + just_before).isoformat()
    )

    assert scenario.run_round(just_before) == {"jobs": 2}
    assert scenario.stored() == {video.key}
    for gone in (waiting.id, late.id):
        with pytest.raises(JobNotFound):
            scenario.store.get(gone)
    assert scenario.store.get(running.job_id).state is JobState.RUNNING


def test_files_that_no_record_names_go_after_a_day(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    scenario = make_scenario(each_artifacts_url)
    lost, video = scenario.running()
    scenario.store.give_up(lost)
    second = scenario.store.claim(lost.job_id, "w")
    second_key = artifact_key(second.job_id, second.label)
    scenario.put(second_key)
    forgotten = artifact_key("0123456789ab0123", "1")
    scenario.put(forgotten)
    foreign = ("videos/readme.txt", "videos/x/1.mp4.bak", "backup/x/1.mp4")
    for key in foreign:
        scenario.put(key)

    assert scenario.run_round(PERIODS.orphans - 60 * MOMENT) == {}
    # While the job runs, the video of either attempt may become the job's.
    assert scenario.run_round(PERIODS.orphans + 60 * MOMENT) == {"orphans": 1}
    assert scenario.stored() == {video.key, second_key, *foreign}
    scenario.store.succeed(second, video.model_copy(update={"key": second_key}), TIMINGS)
    assert scenario.run_round(PERIODS.orphans + 60 * MOMENT) == {"orphans": 1}
    assert scenario.stored() == {second_key, *foreign}


def test_an_empty_redis_makes_no_orphans(
    scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    scenario.succeeded()
    scenario.redis.flushall()
    assert scenario.run_round(300 * DAY) == {}
    assert len(scenario.stored()) == 1
    assert "Redis knows of no job at all" in caplog.text


def test_unfinished_files_go_a_day_later(scenario: Scenario, settings: ServiceSettings) -> None:
    job = scenario.succeeded()
    folder = Path(settings.artifacts_url.removeprefix("file://"), "videos", job.id)
    stale, fresh = folder / ".incoming-stale", folder / ".incoming-fresh"
    for file in (stale, fresh):
        file.write_bytes(b"half")
    os.utime(stale, times=(0, 0))
    assert scenario.run_round(timedelta()) == {"leftovers": 1}
    assert not stale.exists()
    assert fresh.exists()


def test_one_process_at_a_time_and_once_in_an_hour(scenario: Scenario) -> None:
    scenario.succeeded()
    with scenario.redis.lock(redis_keys.RETENTION_LOCK, timeout=60):
        with pytest.raises(RetentionBusy):
            scenario.run_round(PERIODS.jobs + MOMENT)
        scenario.retention.run_if_due(NEVER)
        assert not scenario.redis.exists(redis_keys.RETENTION_DONE)
    scenario.retention.run_if_due(NEVER)
    assert 0 < scenario.redis.ttl(redis_keys.RETENTION_DONE) <= retention.EVERY.total_seconds()
    assert not scenario.redis.exists(redis_keys.RETENTION_LOCK)


def test_a_round_that_is_cut_off_does_not_count_as_done(scenario: Scenario) -> None:
    scenario.succeeded()
    ending = threading.Event()
    ending.set()
    assert scenario.retention.run(ending, now() + PERIODS.jobs + MOMENT).total() == 0
    assert not scenario.redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)
    assert scenario.run_round(PERIODS.jobs + MOMENT) == {"jobs": 1}


def test_a_record_outlives_its_video(
    scenario: Scenario, unused_port: int, bucket: str, redis: Redis
) -> None:
    """A store that is away: the record, without which nobody would find the video, stays."""
    job = scenario.succeeded()
    away = open_artifacts(f"s3://{bucket}/wan?endpoint=http://127.0.0.1:{unused_port}")
    with pytest.raises(ArtifactsUnavailable):
        Retention(redis, away, PERIODS).run(NEVER, now() + PERIODS.jobs + MOMENT)
    assert scenario.store.get(job.id) == job
    assert not redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)


def test_names_of_records_that_redis_dropped_leave_every_index(scenario: Scenario) -> None:
    job = scenario.queued()
    scenario.redis.delete(redis_keys.record(job.id))
    scenario.run_round(timedelta(seconds=redis_keys.RECORD_TTL_S) + MOMENT)
    assert list(scenario.redis.scan_iter(f"{redis_keys.INDEX_PREFIX}*")) == []


def test_a_record_that_cannot_be_read_is_left_alone(
    scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = scenario.succeeded(), scenario.succeeded()
    assert broken.video is not None
    scenario.redis.hset(redis_keys.record(broken.id), "finished_at", "secret nonsense")
    assert scenario.run_round(PERIODS.jobs + MOMENT) == {"jobs": 1}
    assert scenario.redis.exists(redis_keys.record(broken.id))
    assert scenario.stored() == {broken.video.key}
    assert broken.id in caplog.text
    assert sound.id not in caplog.text
    assert "secret" not in caplog.text


def test_many_jobs_are_read_page_by_page(scenario: Scenario) -> None:
    many = 3 * PAGE + 1
    for _ in range(many):
        scenario.store.cancel(scenario.queued().id)
    fresh = scenario.succeeded()
    scenario.redis.hset(
        redis_keys.record(fresh.id), "finished_at", (now() + PERIODS.jobs).isoformat()
    )
    assert scenario.run_round(PERIODS.jobs + MOMENT) == {"jobs": many}
    assert [job.id for job in scenario.store.list().jobs] == [fresh.id]


def test_jobs_deleted_while_they_ran_go_once_they_have_ended(
    make_scenario: Callable[[str], Scenario], each_artifacts_url: str
) -> None:
    scenario = make_scenario(each_artifacts_url)
    attempt, video = scenario.running()
    assert not scenario.store.purge(attempt.job_id)
    run_requested_deletions(scenario.redis, scenario.artifacts, NEVER)
    assert scenario.stored() == {video.key}, "its attempt is still at work"

    scenario.store.succeed(attempt, video, TIMINGS)
    run_requested_deletions(scenario.redis, scenario.artifacts, NEVER)
    assert scenario.stored() == set()
    assert left_of_jobs(scenario.redis) == []


def test_what_is_noted_of_a_video_makes_no_record(scenario: Scenario) -> None:
    job = scenario.succeeded()
    scenario.store.purge(job.id)
    assert scenario.redis.exists(redis_keys.record(job.id)) == 0
    RetentionIndex(scenario.redis).video_deleted(job.id)
    assert scenario.redis.exists(redis_keys.record(job.id)) == 0


def test_a_round_logs_what_it_deleted(scenario: Scenario, caplog: pytest.LogCaptureFixture) -> None:
    scenario.succeeded()
    with caplog.at_level(logging.INFO, logger="service.maintenance.retention"):
        scenario.run_round(timedelta())
        assert caplog.text == "", "a round that found nothing says nothing"
        scenario.run_round(PERIODS.videos + MOMENT)
    assert "videos: 1, jobs with their videos: 0" in caplog.text


def test_one_file_that_cannot_be_deleted_does_not_keep_the_others(scenario: Scenario) -> None:
    odd, sound = scenario.succeeded(), scenario.succeeded()
    assert odd.video is not None
    outside = odd.video.model_copy(update={"key": "../outside.mp4"})
    scenario.redis.hset(redis_keys.record(odd.id), "video", outside.model_dump_json())

    with pytest.raises(ArtifactsUnavailable, match=r"1 that are due .*\.\./outside\.mp4"):
        scenario.run_round(PERIODS.videos + MOMENT)
    assert scenario.store.get(sound.id).video_deleted_at is not None
    assert scenario.store.get(odd.id).video_deleted_at is None
    assert not scenario.redis.exists(redis_keys.RETENTION_DONE, redis_keys.RETENTION_LOCK)


class HostClock:
    """The clock of this host, which may be off."""

    def __init__(self) -> None:
        self.off = timedelta()

    def __call__(self) -> datetime:
        return now() + self.off


def test_a_host_whose_clock_is_off_deletes_nothing(
    scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    host = HostClock()
    jobs = [scenario.succeeded() for _ in range(7)]
    careful = Retention(
        scenario.redis, scenario.artifacts, PERIODS, RetentionClock(scenario.redis, host)
    )
    for off in (8 * DAY, -8 * DAY, timedelta(minutes=6)):
        host.off = off
        careful.run_if_due(NEVER)
        assert len(scenario.stored()) == len(jobs)
        assert not scenario.redis.exists(redis_keys.RETENTION_DONE)
        assert scenario.redis.exists(redis_keys.RETENTION_REFUSED)
        with pytest.raises(ClockRefused, match="this host's clock and Redis' differ by"):
            careful.run(NEVER)
    assert caplog.text.count("nothing is deleted: this host's clock") == 3
    host.off = timedelta(minutes=4)
    careful.run_if_due(NEVER)
    assert scenario.redis.exists(redis_keys.RETENTION_DONE)
    assert not scenario.redis.exists(redis_keys.RETENTION_REFUSED)
    assert len(scenario.stored()) == len(jobs)


def set_retention_clock(redis: Redis, by: timedelta) -> None:
    """Do to what is stored what setting Redis' clock (and this host's) ahead would do."""
    for field, value in redis.hgetall(redis_keys.RETENTION_CLOCK).items():
        moved = int(value) - int(by.total_seconds() * 1000)
        redis.hset(redis_keys.RETENTION_CLOCK, field, moved)


def test_a_clock_that_jumps_ahead_deletes_nothing_for_a_day(
    scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    clock = RetentionClock(scenario.redis)
    clock.steady_now()
    set_retention_clock(scenario.redis, 8 * DAY)
    scenario.retention.run_if_due(NEVER)
    assert "has jumped ahead" in caplog.text
    assert not scenario.redis.exists(redis_keys.RETENTION_DONE)
    for _ in range(24):
        set_retention_clock(scenario.redis, timedelta(minutes=59))
        with pytest.raises(ClockRefused):
            clock.steady_now()
    set_retention_clock(scenario.redis, timedelta(minutes=59))
    clock.steady_now()


def test_a_short_pause_of_all_services_holds_deletion_up_for_as_long(scenario: Scenario) -> None:
    clock = RetentionClock(scenario.redis)
    clock.steady_now()
    set_retention_clock(scenario.redis, timedelta(minutes=61))
    with pytest.raises(ClockRefused, match="no service was running"):
        clock.steady_now()
    set_retention_clock(scenario.redis, timedelta(minutes=40))
    with pytest.raises(ClockRefused):
        clock.steady_now()
    set_retention_clock(scenario.redis, timedelta(minutes=22))
    clock.steady_now()


def test_a_clock_that_is_corrected_ends_the_hold(scenario: Scenario) -> None:
    clock = RetentionClock(scenario.redis)
    clock.steady_now()
    set_retention_clock(scenario.redis, 8 * DAY)
    with pytest.raises(ClockRefused):
        clock.steady_now()
    set_retention_clock(scenario.redis, -8 * DAY)
    clock.steady_now()


def test_an_operator_may_delete_in_spite_of_a_jump(scenario: Scenario) -> None:
    RetentionClock(scenario.redis).steady_now()
    set_retention_clock(scenario.redis, 8 * DAY)
    assert scenario.retention.run(NEVER).total() == 0
    assert scenario.redis.exists(redis_keys.RETENTION_DONE)


def test_a_service_whose_clock_is_behind_makes_no_old_records(scenario: Scenario) -> None:
    job = scenario.succeeded()
    scenario.redis.hset(redis_keys.record(job.id), "created_at", (now() - 29 * DAY).isoformat())
    assert scenario.run_round(timedelta()) == {}


def test_a_sweep_of_a_store_that_is_missing_deletes_and_notes_nothing(
    scenario: Scenario, settings: ServiceSettings
) -> None:
    """A share that was not mounted: its videos are there again once it is."""
    url = settings.artifacts_url
    folder = Path(url.removeprefix("file://"))
    known = open_known_artifacts(url, scenario.redis)
    known.verify()
    careful = Retention(scenario.redis, known, PERIODS)
    kept, purged = scenario.succeeded(), scenario.succeeded()
    scenario.store.purge(purged.id)
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir()

    for period in (PERIODS.videos, PERIODS.jobs):
        with pytest.raises(ArtifactsUnavailable, match="missing"):
            careful.run(NEVER, now() + period + MOMENT)
    assert scenario.store.get(kept.id).video_deleted_at is None
    assert not scenario.redis.exists(redis_keys.RETENTION_DONE)
    folder.rmdir()
    away.rename(folder)
    assert kept.video is not None
    assert kept.video.key in scenario.stored()


@pytest.mark.parametrize("sound_ones", [0, 1])
def test_a_round_ends_once_nothing_can_be_deleted(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, sound_ones: int
) -> None:
    """Ten files in a row that cannot be deleted end it; one that can begins the count anew."""
    monkeypatch.setattr(retention, "MAX_FAULTS_IN_A_ROW", 2)
    jobs = [scenario.succeeded() for _ in range(4)]
    odd = (jobs[0], *jobs[1 + sound_ones :])
    for job in odd:
        assert job.video is not None
        outside = job.video.model_copy(update={"key": f"../{job.id}.mp4"})
        scenario.redis.hset(redis_keys.record(job.id), "video", outside.model_dump_json())
    with pytest.raises(ArtifactsUnavailable, match=f"^{2 + sound_ones} that are due"):
        scenario.run_round(PERIODS.videos + MOMENT)


def test_pictures_that_the_next_version_adds_go_with_their_video(scenario: Scenario) -> None:
    attempt, video = scenario.running()
    scenario.store.succeed(attempt, video, TIMINGS)
    preview = video.key.replace(".mp4", "-preview.webp")
    scenario.put(preview)
    extended = json.loads(video.model_dump_json()) | {"preview": {"key": preview, "loops": True}}
    scenario.redis.hset(redis_keys.record(attempt.job_id), "video", json.dumps(extended))

    assert scenario.run_round(PERIODS.orphans + 60 * MOMENT) == {}
    assert scenario.run_round(PERIODS.videos + 60 * MOMENT) == {"videos": 1}
    assert scenario.stored() == set()


def test_a_record_of_another_format_and_its_files_are_left_alone(
    scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    """What its fields mean is not known here."""
    jobs = [scenario.succeeded() for _ in range(3)]
    for job in jobs:
        scenario.redis.hset(redis_keys.record(job.id), "format", "2")
    kept = scenario.stored()
    assert scenario.run_round(PERIODS.jobs + MOMENT) == {}
    assert scenario.stored() == kept
    assert all(scenario.redis.exists(redis_keys.record(job.id)) for job in jobs)
    assert caplog.text.count("The age of 3 jobs cannot be read") == 1
