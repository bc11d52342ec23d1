"""Progress goes out, the lease is renewed and the wish to stop comes in, whatever Redis does."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.errors import GenerationCancelled, StaleAttempt
from jobs.record import Attempt, Progress, Stage
from jobs.store import events
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from tests.support.killable_valkey import KillableValkey
from tests.support.requests import order
from worker.job import lease as module
from worker.job.lease import ASK_EVERY_S, TELL_EVERY_S, LeaseKeeper
from worker.process.redis_retry import RedisOutage


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(order(), "queue").job.id, "w")


@pytest.fixture
def lifeline(store: JobStore, attempt: Attempt) -> Iterator[LeaseKeeper]:
    with LeaseKeeper(store, attempt, RedisOutage()) as line:
        yield line


def at(step: int, steps: int = 100) -> Progress:
    return Progress(stage=Stage.DENOISE, step=step, steps=steps)


def told(redis: Redis, job_id: str) -> list[Progress]:
    seen = events.decode(redis.xrange(*events.range_after(job_id, events.START)))
    return [event.progress for event in seen if event.kind == "progress" and event.progress]


def test_fast_steps_are_published_in_part_and_the_edges_of_a_stage_always(
    lifeline: LeaseKeeper, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    for step in range(101):
        lifeline.tell(at(step))
    lifeline.tell(Progress(stage=Stage.VAE, step=0, steps=3))
    wait_until(lambda: store.get(attempt.job_id).progress == Progress(stage="vae", step=0, steps=3))
    seen = told(redis, attempt.job_id)
    assert seen[0] == at(0)
    assert at(100) in seen
    assert len(seen) <= 4


def test_the_latest_step_is_published_in_the_end(
    lifeline: LeaseKeeper, store: JobStore, attempt: Attempt
) -> None:
    for step in (0, 1, 2, 3):
        lifeline.tell(at(step))
    wait_until(lambda: store.get(attempt.job_id).progress == at(3), TELL_EVERY_S + 5)


def test_redis_is_asked_only_now_and_then(lifeline: LeaseKeeper, redis: Redis) -> None:
    def commands() -> int:
        return int(redis.info("stats")["total_commands_processed"])

    before, started = commands(), time.monotonic()
    time.sleep(0.5)
    assert commands() - before <= 2 + (time.monotonic() - started) / ASK_EVERY_S


def test_a_cancel_comes_in(lifeline: LeaseKeeper, store: JobStore, attempt: Attempt) -> None:
    assert lifeline.stop is None
    store.cancel(attempt.job_id)
    wait_until(lambda: isinstance(lifeline.stop, GenerationCancelled))


def test_a_newer_attempt_ends_this_one(
    lifeline: LeaseKeeper, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    redis.hset(redis_keys.record(attempt.job_id), "lease_ms", 1)
    assert Recovery(redis).run() == {attempt.job_id: "queued"}
    store.claim(attempt.job_id, "other")
    wait_until(lambda: isinstance(lifeline.stop, StaleAttempt))


def test_the_lease_is_renewed_also_of_a_job_that_is_to_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, store: JobStore, redis: Redis, attempt: Attempt
) -> None:
    monkeypatch.setattr(module, "RENEW_EVERY_S", 0.1)
    store.cancel(attempt.job_id)

    def lease() -> int:
        return int(redis.hget(redis_keys.record(attempt.job_id), "lease_ms") or 0)

    with LeaseKeeper(store, attempt, RedisOutage()):
        for _ in range(2):
            before = lease()
            wait_until(lambda: lease() > before)  # noqa: B023


def test_a_redis_that_is_away_stops_nothing_and_loses_no_progress(
    mortal: KillableValkey, caplog: pytest.LogCaptureFixture
) -> None:
    with mortal.connect() as redis:
        store = JobStore(redis)
        attempt = store.claim(store.create(order(), "queue").job.id, "w")
        with LeaseKeeper(store, attempt, RedisOutage()) as line:
            mortal.kill()
            line.tell(at(100))
            time.sleep(2)
            assert line.stop is None
            mortal.start()
            wait_until(lambda: store.get(attempt.job_id).progress == at(100))
            store.cancel(attempt.job_id)
            wait_until(lambda: line.stop is not None)
    said = [
        each.getMessage() for each in caplog.records if each.name == "worker.process.redis_retry"
    ]
    assert len(said) == 2, said
