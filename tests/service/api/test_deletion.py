"""Test the deletion of jobs in each of their states, with either kind of artifact store."""

from pathlib import Path

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.store import (
    ArtifactStore,
    artifact_key,
    open_artifacts,
    spritesheet_key,
    thumbnail_key,
)
from jobs.errors import JobNotFound
from jobs.record import Attempt, Picture, Spritesheet, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.deletion import delete_job
from jobs.store.job_store import JobStore

TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


@pytest.fixture
def artifacts(each_artifacts_url: str) -> ArtifactStore:
    return open_artifacts(each_artifacts_url)


@pytest.fixture
def job_id(store: JobStore, request_for_video: GenerationRequest) -> str:
    return store.create(request_for_video, "q").job.id


def put_video(artifacts: ArtifactStore, attempt: Attempt, folder: Path) -> Video:
    """Store a video and its pictures."""
    made = folder / "made.mp4"
    made.write_bytes(b"0123456789")
    keys = [
        make(attempt.job_id, attempt.label)
        for make in (artifact_key, thumbnail_key, spritesheet_key)
    ]
    for key in keys:
        artifacts.put(key, made)
    file = {"bytes": 10, "sha256": "ab", "width": 96, "height": 96}
    grid = {"columns": 1, "rows": 1, "frame_width": 96, "frame_height": 96, "frames": (0,)}
    video = Video(
        key=keys[0],
        num_frames=17,
        fps=8,
        thumbnail=Picture(key=keys[1], **file),
        spritesheet=Spritesheet(key=keys[2], **file, **grid),
        **file,
    )
    assert video.keys == tuple(keys)
    return video


def test_finished_job_goes_with_the_videos_of_all_its_attempts_and_nothing_else(
    store: JobStore,
    artifacts: ArtifactStore,
    request_for_video: GenerationRequest,
    job_id: str,
    tmp_path: Path,
) -> None:
    first = store.claim(job_id, "w")
    put_video(artifacts, first, tmp_path)
    store.give_up(first)
    second = store.claim(job_id, "w")
    store.succeed(second, put_video(artifacts, second, tmp_path), TIMINGS)
    other = store.claim(store.create(request_for_video, "q").job.id, "w")
    kept = put_video(artifacts, other, tmp_path)
    assert delete_job(store, artifacts, job_id)
    with pytest.raises(JobNotFound):
        store.get(job_id)
    assert {stored.key for stored in artifacts.list()} == set(kept.keys)
    assert delete_job(store, artifacts, job_id), "deleting what is gone is no error"


def test_queued_job_never_runs(
    store: JobStore, artifacts: ArtifactStore, redis: Redis, job_id: str
) -> None:
    assert delete_job(store, artifacts, job_id)
    assert redis.llen("rq:queue:q") == 0
    with pytest.raises(JobNotFound):
        store.claim(job_id, "w")


def test_running_job_is_hidden_at_once_and_gone_with_its_video_after_its_end(
    store: JobStore, artifacts: ArtifactStore, redis: Redis, job_id: str, tmp_path: Path
) -> None:
    attempt = store.claim(job_id, "w")
    assert not delete_job(store, artifacts, job_id)
    with pytest.raises(JobNotFound):
        store.get(job_id)
    assert store.cancel_requested(attempt)
    # The attempt had gone too far to be stopped.
    store.succeed(attempt, put_video(artifacts, attempt, tmp_path), TIMINGS)
    assert redis.zrange(redis_keys.DELETIONS, 0, -1) == [job_id.encode()]
    assert delete_job(store, artifacts, job_id)
    assert list(artifacts.list()) == []
    assert redis.zcard(redis_keys.DELETIONS) == 0
    assert redis.exists(redis_keys.record(job_id), redis_keys.events(job_id)) == 0
