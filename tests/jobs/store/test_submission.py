"""Test idempotency keys, limits, owners, deletion, events and counters of jobs."""

import time
from typing import Any, cast

import pytest
from redis import Redis
from rq import Queue

from jobs import durations, ids, redis_keys
from jobs.errors import IdempotencyConflict, JobNotFound, QueueFull, QuotaExceeded
from jobs.record import Failure, JobRecord, Progress, Stage, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.live import events
from jobs.store.submission import RETRY_AFTER_S, Idempotency, Submission

QUEUE = "q"
VIDEO = Video(key="k", bytes=1, sha256="ab", width=96, height=96, num_frames=17, fps=8)
TIMINGS = StageTimings(
    queue_s=0.1, text_encoder_s=0.2, denoise_s=3, vae_s=0.4, mp4_s=0.1, total_s=3.8
)
HOOK = "https://example.com/hook"


def keyed(key: str, body: object) -> Submission:
    return Submission(owner="ann", idempotency=Idempotency.of(key, body))


def test_the_same_key_and_body_mean_the_same_job(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    first = store.create(request_for_video, QUEUE, keyed("k", {"a": 1, "b": 2}))
    again = store.create(request_for_video, QUEUE, keyed("k", {"b": 2, "a": 1}))
    assert (first.replayed, again.replayed) == (False, True)
    assert again.job == first.job
    assert Queue(QUEUE, connection=redis).job_ids == [first.job.id]
    replayed = store.replay("ann", Idempotency.of("k", {"a": 1, "b": 2}))
    assert replayed is not None
    assert replayed.job == first.job
    assert store.replay("ann", Idempotency.of("other", {})) is None
    assert store.replay("bob", Idempotency.of("k", {"a": 1, "b": 2})) is None


def test_the_same_key_with_another_body_is_refused(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    first = store.create(request_for_video, QUEUE, keyed("k", {"a": 1})).job
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.create(request_for_video, QUEUE, keyed("k", {"a": 2}))
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.replay("ann", Idempotency.of("k", {"a": 2}))
    assert Queue(QUEUE, connection=redis).count == 1


@pytest.mark.parametrize("running", [False, True])
def test_a_key_whose_job_was_deleted_makes_a_new_one(
    store: JobStore, request_for_video: GenerationRequest, running: bool
) -> None:
    first = store.create(request_for_video, QUEUE, keyed("k", {})).job
    if running:  # then its record stays until it has ended
        store.claim(first.id, "w")
    assert store.purge(first.id) is not running
    second = store.create(request_for_video, QUEUE, keyed("k", {}))
    assert not second.replayed
    assert second.job.id != first.id


def test_a_full_queue_takes_no_more(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    submission = Submission(queue_limit=2)
    for _ in range(2):
        store.create(request_for_video, QUEUE, submission)
    with pytest.raises(QueueFull, match="2 jobs are waiting, and 2 is the most") as refused:
        store.create(request_for_video, QUEUE, submission)
    assert refused.value.context["retry_after_s"] == RETRY_AFTER_S
    assert len(store.list().jobs) == Queue(QUEUE, connection=redis).count == 2
    store.create(request_for_video, "another", submission)


def test_a_quota_counts_what_waits_and_what_runs(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    submission = Submission(owner="ann", owner_limit=2)
    running = store.claim(store.create(request_for_video, QUEUE, submission).job.id, "w")
    store.create(request_for_video, QUEUE, submission)
    with pytest.raises(QuotaExceeded, match="You have 2 jobs"):
        store.create(request_for_video, QUEUE, submission)
    store.create(request_for_video, QUEUE, Submission(owner="bob", owner_limit=2))
    store.succeed(running, VIDEO, TIMINGS)
    store.create(request_for_video, QUEUE, submission)


def test_a_quota_does_not_count_expired_records(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    ancient = ids.id_prefix(time.time() - redis_keys.RECORD_TTL_S - 60) + "0" * 20
    redis.zadd(redis_keys.index("queued", "ann"), {ancient: 0})
    submission = Submission(owner="ann", owner_limit=1)
    store.create(request_for_video, QUEUE, submission)
    with pytest.raises(QuotaExceeded, match="You have 1 job waiting"):
        store.create(request_for_video, QUEUE, submission)


def test_a_job_deleted_while_its_key_is_looked_up_is_made_anew(
    store: JobStore, request_for_video: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.create(request_for_video, QUEUE, keyed("k", {})).job
    get = store.get

    def just_deleted(job_id: str) -> JobRecord:
        store.purge(job_id)
        return get(job_id)

    monkeypatch.setattr(store, "get", just_deleted)
    again = store.create(request_for_video, QUEUE, keyed("k", {}))
    assert not again.replayed
    assert again.job.id != first.id


def test_lists_of_one_owner(store: JobStore, request_for_video: GenerationRequest) -> None:
    anns = [store.create(request_for_video, QUEUE, Submission(owner="ann")).job for _ in range(2)]
    bobs = store.create(request_for_video, QUEUE, Submission(owner="bob")).job
    store.cancel(anns[0].id)
    assert [job.id for job in store.list(owner="ann").jobs] == sorted(
        (job.id for job in anns), reverse=True
    )
    assert [job.id for job in store.list(owner="ann", state=JobState.QUEUED).jobs] == [anns[1].id]
    assert [job.id for job in store.list(owner="bob").jobs] == [bobs.id]
    assert len(store.list().jobs) == 3
    assert store.list(owner="nobody").jobs == ()


def test_purging_leaves_nothing_but_the_counts(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(store.create(request_for_video, QUEUE).job.id, "w")
    redis.lpop(Queue(QUEUE, connection=redis).key)
    store.succeed(attempt, VIDEO, TIMINGS)
    assert store.purge(attempt.job_id) is True
    with pytest.raises(JobNotFound):
        store.get(attempt.job_id)
    assert store.list().jobs == ()
    kept = (redis_keys.METRICS, redis_keys.SERIES_PREFIX, "rq:queues")
    assert all(str(name, "utf-8").startswith(kept) for name in redis.scan_iter())
    assert store.purge(attempt.job_id) is True


def test_purging_a_waiting_job_takes_it_out_of_the_queue(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job = store.create(request_for_video, QUEUE).job
    assert store.purge(job.id) is True
    assert Queue(QUEUE, connection=redis).count == 0


def test_purging_a_running_job_waits_for_its_end(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(store.create(request_for_video, QUEUE).job.id, "w")
    assert store.purge(attempt.job_id) is False
    with pytest.raises(JobNotFound):
        store.get(attempt.job_id)
    assert store.list().jobs == ()
    assert store.renew(attempt) is True
    assert redis.zcard(redis_keys.DELETIONS) == 0
    store.cancelled(attempt)
    assert redis.zrange(redis_keys.DELETIONS, 0, -1) == [attempt.job_id.encode()]
    assert store.purge(attempt.job_id) is True
    assert redis.zcard(redis_keys.DELETIONS) == 0


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED])
def test_purging_wakes_those_who_follow_the_job(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest, state: JobState
) -> None:
    """Their streams end at once, and not with a heartbeat."""
    job_id = store.create(request_for_video, QUEUE).job.id
    if state is JobState.RUNNING:
        store.claim(job_id, "w")
    elif state is JobState.CANCELLED:
        store.cancel(job_id)
    with redis.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(redis_keys.EVENTS_CHANNEL)
        assert subscription.get_message(timeout=10) is None  # the confirmation
        store.purge(job_id)
        message = subscription.get_message(timeout=10)
        assert message is not None
        assert message["data"] == job_id.encode()


def test_every_step_of_a_job_is_an_event(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    listener = cast("Any", redis).pubsub(ignore_subscribe_messages=True)
    listener.subscribe(redis_keys.EVENTS_CHANNEL)
    listener.get_message(timeout=1)
    attempt = store.claim(store.create(request_for_video, QUEUE).job.id, "w")
    progress = Progress(stage=Stage.DENOISE, step=1, steps=2, seconds_left=3.5)
    store.progress(attempt, progress)
    store.cancel(attempt.job_id)
    store.cancelled(attempt)
    found = events.decode(redis.xrange(redis_keys.events(attempt.job_id)))
    assert [(each.kind, each.state) for each in found] == [
        ("state", JobState.QUEUED),
        ("state", JobState.RUNNING),
        ("progress", JobState.RUNNING),
        ("state", JobState.RUNNING),
        ("state", JobState.CANCELLED),
    ]
    assert found[2].progress == progress
    assert found[-1].progress is None
    name, *bounds = events.range_after(attempt.job_id, found[2].event_id)
    assert events.decode(redis.xrange(name, *bounds)) == found[3:]
    messages = [listener.get_message(timeout=1) for _ in found]
    assert {message["data"] for message in messages if message} == {attempt.job_id.encode()}
    listener.close()


def test_transitions_are_counted(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    shape = durations.shape(request_for_video)
    first = store.claim(store.create(request_for_video, QUEUE).job.id, "w")
    store.succeed(first, VIDEO, TIMINGS)
    store.succeed(first, VIDEO, TIMINGS)
    second = store.claim(store.create(request_for_video, QUEUE).job.id, "w")
    store.fail(second, Failure(code="out_of_device_memory", detail="No room."))
    found = cast("dict[bytes, bytes]", redis.hgetall(redis_keys.METRICS))
    counts = {name.decode(): float(value) for name, value in found.items()}
    assert counts[f"created|{shape}"] == counts[f"claimed|{shape}"] == 2
    assert counts[f"ended|{shape}|succeeded|"] == 1
    assert counts[f"ended|{shape}|failed|out_of_device_memory"] == 1
    for name, times in (("wait", 2), ("service", 1)):
        buckets = {k: v for k, v in counts.items() if k.startswith(f"{name}|{shape}|")}
        assert buckets.pop(f"{name}|{shape}|sum") >= 0
        assert sum(buckets.values()) == times


def test_ends_with_a_webhook_are_in_the_outbox(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    with_hook = store.create(request_for_video, QUEUE, Submission(webhook_url=HOOK)).job
    without = store.create(request_for_video, QUEUE).job
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    for job in (with_hook, without):
        store.cancel(job.id)
    assert redis.zrange(redis_keys.WEBHOOKS_DUE, 0, -1) == [with_hook.id.encode()]
    assert store.get(with_hook.id).webhook_url == HOOK
