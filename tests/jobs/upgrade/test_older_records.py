"""Test that this code reads and goes on with what an older revision left in Redis.

`older-records.json` is what processes of that revision wrote, key by key, as `python -m
benchmarks.serving.upgrade --rev REVISION --dump FILE` dumps it. That benchmark also runs both
revisions beside each other, and goes back.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from benchmarks.serving.redis_dump import restore
from jobs import redis_keys
from jobs.record import JobRecord, StageTimings, Video
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from jobs.store.webhook_outbox import Outbox, WebhookState
from service.auth.api_keys import KeyStore, Role
from service.comparisons.model import PairState
from service.comparisons.store import ComparisonStore
from worker.consumer.delivery import Delivery

DUMP: dict[str, Any] = json.loads(
    (Path(__file__).parent / "older-records.json").read_text(encoding="utf-8")
)


@pytest.fixture
def older(redis: Redis) -> JobStore:
    """A store over the database that the older revision has left."""
    restore(redis, DUMP["keys"])
    return JobStore(redis)


def jobs_by_state(store: JobStore) -> dict[JobState, list[JobRecord]]:
    found: dict[JobState, list[JobRecord]] = {}
    for job in store.list(limit=100).jobs:
        found.setdefault(job.state, []).append(job)
    return found


def test_every_record_is_read(older: JobStore) -> None:
    found = jobs_by_state(older)
    in_redis = [key for key in DUMP["keys"] if key.startswith(redis_keys.RECORD_PREFIX)]
    assert sum(map(len, found.values())) == len(in_redis)
    assert set(found) == {JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUEUED}
    done = [job for job in found[JobState.SUCCEEDED] if job.metadata == {"shot": "7"}]
    assert len(done) == 1
    assert done[0].video is not None
    assert done[0].trace is None
    assert {job.request.mode for job in found[JobState.SUCCEEDED]} == {"bf16", "w8a8"}


def test_a_waiting_job_is_delivered_and_ends(older: JobStore, redis: Redis) -> None:
    waiting = jobs_by_state(older)[JobState.QUEUED]
    assert len(waiting) == 2
    (queue,) = {job.queue for job in waiting}
    assert Queue(queue, connection=redis).count == 2
    for job in waiting:
        delivered = Delivery.fetch(job.id, connection=redis, serializer=JSONSerializer)
        assert list(delivered.args) == [job.id]
        attempt = older.claim(job.id, "new-worker")
        assert older.get_for(attempt) == older.get(job.id)
        video = Video(key="k", bytes=1, sha256="0", width=1, height=1, num_frames=1, fps=1)
        timings = StageTimings(
            queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0
        )
        older.succeed(attempt, video, timings)
        assert older.get(job.id).state is JobState.SUCCEEDED


def test_a_job_whose_worker_was_lost_is_found(older: JobStore, redis: Redis) -> None:
    job = jobs_by_state(older)[JobState.QUEUED][0]
    redis.delete(redis_keys.RECOVERY)
    Queue(job.queue, connection=redis).empty()
    recovery = Recovery(redis)
    recovery.run()
    assert redis.hget(redis_keys.record(job.id), "missing_ms") is not None


def test_webhooks_are_still_due(older: JobStore, redis: Redis) -> None:
    outbox = Outbox(redis)
    with_webhook = [
        job
        for jobs in jobs_by_state(older).values()
        for job in jobs
        if job.webhook_url and job.state.is_terminal
    ]
    assert len(with_webhook) == 2
    for job in with_webhook:
        status = outbox.status(job)
        assert status is not None
        assert status.state is WebhookState.PENDING
    due: Any = redis.zcard(redis_keys.WEBHOOKS_DUE)
    assert due == 2


def test_keys_and_comparisons_are_read(older: JobStore, redis: Redis) -> None:
    keys = {key.name: key for key in KeyStore(redis).all()}
    assert {name: key.role for name, key in keys.items()} == {
        "ops": Role.OPS,
        "alice": Role.USER,
        "rachel": Role.RATER,
    }
    assert keys["ops"].is_usable
    assert not keys["alice"].is_usable
    store = ComparisonStore(redis)
    (comparison,) = store.list().comparisons
    assert comparison.title == "upgrade"
    pairs = store.pairs(comparison.id)
    assert [pair.state for pair in pairs] == [PairState.READY] * 7
