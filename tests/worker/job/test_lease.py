"""Test that progress is published, the lease renewed and a cancel detected, whatever Redis does."""

import time
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.errors import GenerationCancelled, StaleAttempt
from jobs.record import Attempt, Progress, Stage
from jobs.store.job_store import JobStore
from jobs.store.live import events
from jobs.store.recovery import Recovery
from tests.support.killable_valkey import KillableValkey
from tests.support.requests import generation_request
from worker.job import lease as module
from worker.job.lease import CHECK_EVERY_S, PUBLISH_EVERY_S, LeaseKeeper
from worker.process.redis_retry import RedisOutage


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(generation_request(), "queue").job.id, "w")


@pytest.fixture
def lease(store: JobStore, attempt: Attempt) -> Iterator[LeaseKeeper]:
    with LeaseKeeper(store, attempt, RedisOutage()) as keeper:
        yield keeper


def progress_at(step: int, steps: int = 100) -> Progress:
    return Progress(stage=Stage.DENOISE, step=step, steps=steps)


def published(redis: Redis, job_id: str) -> list[Progress]:
    seen = events.decode(redis.xrange(*events.range_after(job_id, events.START)))
    return [event.progress for event in seen if event.kind == "progress" and event.progress]


def test_fast_steps_are_published_in_part_and_the_ends_of_a_stage_always(
    lease: LeaseKeeper, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    for step in range(101):
        lease.publish(progress_at(step))
    lease.publish(Progress(stage=Stage.VAE, step=0, steps=3))
    wait_until(lambda: store.get(attempt.job_id).progress == Progress(stage="vae", step=0, steps=3))
    seen = published(redis, attempt.job_id)
    assert seen[0] == progress_at(0)
    assert progress_at(100) in seen
    assert len(seen) <= 4


def test_the_latest_step_is_published_in_the_end(
    lease: LeaseKeeper, store: JobStore, attempt: Attempt
) -> None:
    for step in (0, 1, 2, 3):
        lease.publish(progress_at(step))
    wait_until(lambda: store.get(attempt.job_id).progress == progress_at(3), PUBLISH_EVERY_S + 5)


def test_redis_gets_few_commands_and_never_none(lease: LeaseKeeper, redis: Redis) -> None:
    def checks() -> int:
        return int(redis.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"])

    before, started = checks(), time.monotonic()
    wait_until(lambda: checks() >= before + 5)
    asked = checks() - before
    assert asked <= 2 + (time.monotonic() - started) / CHECK_EVERY_S


def test_a_cancel_is_detected(lease: LeaseKeeper, store: JobStore, attempt: Attempt) -> None:
    assert lease.stop is None
    store.cancel(attempt.job_id)
    wait_until(lambda: isinstance(lease.stop, GenerationCancelled))


def test_a_newer_attempt_ends_this_one(
    lease: LeaseKeeper, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    redis.hset(redis_keys.record(attempt.job_id), "lease_ms", 1)
    assert Recovery(redis).run() == {attempt.job_id: "queued"}
    store.claim(attempt.job_id, "other")
    wait_until(lambda: isinstance(lease.stop, StaleAttempt))


def test_the_lease_is_renewed_also_of_a_job_that_is_to_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, store: JobStore, redis: Redis, attempt: Attempt
) -> None:
    monkeypatch.setattr(module, "RENEW_EVERY_S", 0.1)
    store.cancel(attempt.job_id)

    def lease_ms() -> int:
        return int(redis.hget(redis_keys.record(attempt.job_id), "lease_ms") or 0)

    with LeaseKeeper(store, attempt, RedisOutage()):
        for _ in range(2):
            before = lease_ms()
            wait_until(lambda: lease_ms() > before)  # noqa: B023


def test_after_an_outage_the_lease_is_renewed_first(
    killable_valkey: KillableValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have little time left: others judge it six seconds after Redis' return."""
    monkeypatch.setattr(module, "RENEW_EVERY_S", 1000)
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        attempt = store.claim(store.create(generation_request(), "queue").job.id, "w")

        def lease_ms() -> int:
            return int(redis.hget(redis_keys.record(attempt.job_id), "lease_ms") or 0)

        before, outage = lease_ms(), RedisOutage()
        with LeaseKeeper(store, attempt, outage):
            killable_valkey.kill()
            wait_until(lambda: outage._since is not None)
            killable_valkey.start()
            wait_until(lambda: lease_ms() > before)


def test_a_redis_that_is_away_stops_nothing_and_loses_no_progress(
    killable_valkey: KillableValkey, caplog: pytest.LogCaptureFixture
) -> None:
    with killable_valkey.connect() as redis:
        store = JobStore(redis)
        attempt = store.claim(store.create(generation_request(), "queue").job.id, "w")
        with LeaseKeeper(store, attempt, RedisOutage()) as keeper:
            killable_valkey.kill()
            keeper.publish(progress_at(100))
            time.sleep(2)
            assert keeper.stop is None
            killable_valkey.start()
            wait_until(lambda: store.get(attempt.job_id).progress == progress_at(100))
            store.cancel(attempt.job_id)
            wait_until(lambda: keeper.stop is not None)
    messages = [
        each.getMessage() for each in caplog.records if each.name == "worker.process.redis_retry"
    ]
    assert len(messages) == 2, messages


class InterruptedStore(JobStore):
    """A store during whose first write of progress the job goes on."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.during: Callable[[], None] | None = None

    def progress(self, attempt: Attempt, progress: Progress) -> None:
        super().progress(attempt, progress)
        if self.during is not None:
            then, self.during = self.during, None
            then()


@pytest.mark.parametrize("first", [0, 1], ids=["an-edge", "a-step-between"])
def test_a_step_that_is_published_during_the_write_of_another_is_not_lost(
    redis: Redis, attempt: Attempt, first: int
) -> None:
    store = InterruptedStore(redis)
    with LeaseKeeper(store, attempt, RedisOutage()) as keeper:
        store.during = lambda: keeper.publish(progress_at(7))
        keeper.publish(progress_at(first))
        wait_until(lambda: store.get(attempt.job_id).progress == progress_at(7), 10)
    assert published(redis, attempt.job_id) == [progress_at(first), progress_at(7)]
