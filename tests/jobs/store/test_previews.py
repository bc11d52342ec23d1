"""Test that a job has a preview only while it runs, and only its own attempt's."""

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.errors import StaleAttempt
from jobs.record import Attempt, Failure, JobRecord
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.live import events
from jobs.store.live.previews import MAX_PREVIEW_BYTES, PreviewWriter, read_preview


@pytest.fixture
def job(store: JobStore, request_for_video: GenerationRequest) -> JobRecord:
    return store.create(request_for_video, "q").job


@pytest.fixture
def attempt(store: JobStore, job: JobRecord) -> Attempt:
    return store.claim(job.id, "w")


@pytest.fixture
def writer(redis: Redis) -> PreviewWriter:
    return PreviewWriter(redis)


def test_each_preview_replaces_the_one_before_and_is_announced(
    store: JobStore, redis: Redis, writer: PreviewWriter, attempt: Attempt
) -> None:
    assert read_preview(redis, attempt.job_id) is None
    assert store.get(attempt.job_id).preview is None
    for number, picture in enumerate((b"first", b"second"), start=1):
        writer.write(attempt, picture)
        assert read_preview(redis, attempt.job_id) == picture
        assert store.get(attempt.job_id).preview == number
    assert 0 < redis.ttl(redis_keys.preview(attempt.job_id)) <= redis_keys.PREVIEW_TTL_S
    entries = redis.xrange(*events.range_after(attempt.job_id, events.START))
    found = [(event.kind, event.preview) for event in events.decode(entries)]
    assert found[-2:] == [("preview", 1), ("preview", 2)]


def test_a_preview_disappears_when_its_attempt_ends_in_whatever_way(
    store: JobStore, redis: Redis, writer: PreviewWriter, attempt: Attempt
) -> None:
    writer.write(attempt, b"picture")
    store.release(attempt)
    assert store.get(attempt.job_id).preview is None
    assert read_preview(redis, attempt.job_id) is None

    again = store.claim(attempt.job_id, "w")
    writer.write(again, b"picture")
    assert store.get(attempt.job_id).preview == 2, "no two previews of a job share a number"
    store.fail(again, Failure(code="x", detail="X."))
    assert store.get(attempt.job_id).preview is None
    assert read_preview(redis, attempt.job_id) is None


@pytest.mark.parametrize("how", ["ended", "another attempt", "to be deleted", "gone"])
def test_only_the_running_attempt_writes_previews(
    store: JobStore, redis: Redis, writer: PreviewWriter, attempt: Attempt, how: str
) -> None:
    match how:
        case "ended":
            store.cancelled(attempt)
        case "another attempt":
            store.release(attempt)
            store.claim(attempt.job_id, "w2")
        case "to be deleted":
            writer.write(attempt, b"before")
            store.purge(attempt.job_id)
        case _:
            redis.delete(redis_keys.record(attempt.job_id))
    with pytest.raises(StaleAttempt):
        writer.write(attempt, b"too late")
    assert read_preview(redis, attempt.job_id) is None


def test_a_purge_leaves_no_preview(
    store: JobStore, redis: Redis, writer: PreviewWriter, attempt: Attempt
) -> None:
    writer.write(attempt, b"picture")
    store.purge(attempt.job_id)
    store.cancelled(attempt)
    store.purge(attempt.job_id)
    assert not redis.keys(f"*{attempt.job_id}*")


def test_a_preview_has_at_most_so_many_bytes(writer: PreviewWriter, attempt: Attempt) -> None:
    writer.write(attempt, bytes(MAX_PREVIEW_BYTES))
    with pytest.raises(AssertionError, match="20001"):
        writer.write(attempt, bytes(MAX_PREVIEW_BYTES + 1))
