"""Test the outbox: which webhooks are due, their leases, and their outcomes."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.record import Failure, JobRecord
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from jobs.store.webhook_outbox import Lease, Outbox, Outcome, WebhookState, WebhookStatus

URL = "https://hooks.example.com/done"
SHAPE = "wan-mini|bf16|96x96|17|1"
MakeJob = Callable[..., JobRecord]


@pytest.fixture
def outbox(redis: Redis) -> Outbox:
    return Outbox(redis)


@pytest.fixture
def make_job(store: JobStore, request_for_video: GenerationRequest) -> MakeJob:
    """Make a job with a webhook, ended or queued."""

    def make(url: str | None = URL, *, ended: bool = True) -> JobRecord:
        job = store.create(request_for_video, "q", Submission(webhook_url=url)).job
        return store.cancel(job.id) if ended else job

    return make


def counted(redis: Redis) -> dict[str, int]:
    """Return the outcomes of calls as /metrics counts them."""
    prefix = f"webhook|{SHAPE}|"
    found = {}
    for name, value in redis.hgetall(redis_keys.METRICS).items():
        field = cast("bytes", name).decode()
        if field.startswith("webhook|"):
            found[field.removeprefix(prefix)] = int(value)
    return found


def make_due(redis: Redis, job: JobRecord) -> None:
    """Make the webhook due now, as after the pause before the next try or the end of its lease."""
    redis.zadd(redis_keys.WEBHOOKS_DUE, {job.id: 1})


def test_a_webhook_is_due_when_its_job_ends(
    store: JobStore, outbox: Outbox, make_job: MakeJob
) -> None:
    cancelled = make_job(ended=False)
    failed = make_job(ended=False)
    make_job(None)
    assert outbox.take(10) == []
    attempt = store.claim(failed.id, "w")
    assert outbox.take(10) == []
    store.cancel(cancelled.id)
    assert [lease.job_id for lease in outbox.take(10)] == [cancelled.id]
    store.fail(attempt, Failure(code="generation_failed", detail="no"))
    assert [lease.job_id for lease in outbox.take(10)] == [failed.id]


def test_leased_entries_are_not_taken_again(
    redis: Redis, outbox: Outbox, make_job: MakeJob
) -> None:
    jobs = [make_job() for _ in range(5)]
    first, second = outbox.take(3), Outbox(redis).take(3)
    assert [lease.job_id for lease in first + second] == [job.id for job in jobs]
    assert outbox.take(3) == []
    assert outbox.take(0) == []


def test_a_lease_ends(redis: Redis, make_job: MakeJob) -> None:
    job = make_job()
    short = Outbox(redis, lease_s=0.2)
    (first,) = short.take(1)
    assert short.take(1) == []
    time.sleep(0.3)
    (second,) = short.take(1)
    assert second.job_id == job.id
    assert second.until_ms > first.until_ms
    # The first holder is slow but alive: it must not undo what the second does.
    assert not short.settle(first, Outcome(error="no connection", retry_in_s=60))
    assert not short.postpone(first, 60)
    assert short.settle(second, Outcome(204))
    assert not short.settle(first, Outcome(error="no connection"))
    status = short.status(job)
    assert status is not None
    assert (status.state, status.tries) == (WebhookState.DELIVERED, 1)
    assert counted(redis) == {"delivered": 1}


def test_pending_from_the_start(outbox: Outbox, make_job: MakeJob) -> None:
    assert outbox.status(make_job(ended=False)) == WebhookStatus()
    assert outbox.status(make_job(None)) is None


def test_delivered(redis: Redis, outbox: Outbox, make_job: MakeJob) -> None:
    job = make_job()
    (lease,) = outbox.take(1)
    assert outbox.settle(lease, Outcome(202))
    status = outbox.status(job)
    assert status is not None
    assert status.delivered_at is not None
    assert abs((datetime.now(UTC) - status.delivered_at).total_seconds()) < 60
    assert status == WebhookStatus(
        state=WebhookState.DELIVERED, tries=1, last_status=202, delivered_at=status.delivered_at
    )
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    # Kept as long as the record, and no longer.
    assert (
        0 <= redis.pttl(redis_keys.record(job.id)) - redis.pttl(redis_keys.webhook(job.id)) < 1000
    )


def test_failed_tries_are_counted_and_only_the_latest_is_shown(
    redis: Redis, outbox: Outbox, make_job: MakeJob
) -> None:
    job = make_job()
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(500, "answered 500", retry_in_s=60))
    assert outbox.status(job) == WebhookStatus(tries=1, last_status=500, last_error="answered 500")
    assert outbox.take(1) == []
    second, microsecond = redis.time()
    due = redis.zscore(redis_keys.WEBHOOKS_DUE, job.id)
    assert due == pytest.approx(second * 1000 + microsecond / 1000 + 60_000, abs=5000)

    make_due(redis, job)
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(error="no connection", retry_in_s=60))
    assert outbox.status(job) == WebhookStatus(tries=2, last_error="no connection")

    make_due(redis, job)
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(410, "gone"))
    assert outbox.status(job) == WebhookStatus(
        state=WebhookState.GIVEN_UP, tries=3, last_status=410, last_error="gone"
    )
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    assert counted(redis) == {"retried": 2, "given_up": 1}


def test_a_repeated_settlement_counts_once(redis: Redis, outbox: Outbox, make_job: MakeJob) -> None:
    """As the client does after a lost response."""
    job = make_job()
    (lease,) = outbox.take(1)
    outcome = Outcome(error="no connection", retry_in_s=60)
    assert [outbox.settle(lease, outcome) for _ in range(3)] == [True, False, False]
    status = outbox.status(job)
    assert status is not None
    assert status.tries == 1
    assert counted(redis) == {"retried": 1}


def test_postponed_is_no_try(redis: Redis, outbox: Outbox, make_job: MakeJob) -> None:
    job = make_job()
    (lease,) = outbox.take(1)
    assert outbox.postpone(lease, 60)
    assert outbox.take(1) == []
    make_due(redis, job)
    (lease,) = outbox.take(1)
    assert outbox.postpone(lease, 0)
    time.sleep(0.01)
    assert [each.job_id for each in outbox.take(1)] == [job.id]
    assert outbox.status(job) == WebhookStatus()
    assert counted(redis) == {}


def test_deleting_a_job_deletes_its_webhook(
    redis: Redis, store: JobStore, outbox: Outbox, make_job: MakeJob
) -> None:
    job = make_job()
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(error="no connection", retry_in_s=60))
    assert redis.exists(redis_keys.webhook(job.id))
    make_due(redis, job)
    (lease,) = outbox.take(1)
    store.purge(job.id)
    assert not redis.exists(redis_keys.webhook(job.id))
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    # The call that is running at that moment leaves nothing behind.
    assert not outbox.settle(lease, Outcome(204))
    assert not redis.exists(redis_keys.webhook(job.id))


def test_the_webhook_of_a_job_that_is_gone_is_dropped(
    redis: Redis, outbox: Outbox, make_job: MakeJob
) -> None:
    expired, deleted = make_job(), make_job()
    leases = outbox.take(2)
    redis.delete(redis_keys.record(expired.id))
    redis.hset(redis_keys.record(deleted.id), "delete_requested", "1")
    assert [outbox.settle(lease, Outcome(204)) for lease in leases] == [False, False]
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    assert not redis.exists(redis_keys.webhook(expired.id), redis_keys.webhook(deleted.id))


def test_drop(redis: Redis, outbox: Outbox, make_job: MakeJob) -> None:
    job = make_job()
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(error="no connection", retry_in_s=60))
    outbox.drop(job.id)
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 0
    assert not redis.exists(redis_keys.webhook(job.id))


def test_the_status_of_many(outbox: Outbox, make_job: MakeJob) -> None:
    delivered, without, pending = make_job(), make_job(None), make_job(ended=False)
    (lease,) = outbox.take(1)
    assert lease == Lease(delivered.id, lease.until_ms)
    outbox.settle(lease, Outcome(200))
    found = outbox.statuses([pending, without, delivered])
    assert [None if each is None else each.state for each in found] == [
        WebhookState.PENDING,
        None,
        WebhookState.DELIVERED,
    ]
    assert outbox.statuses([]) == []
