"""Test with worker processes an operator's order to take no jobs, and the order to resume."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.errors import WorkerNotFound
from jobs.redis_client import connect
from jobs.state import JobState
from jobs.store import workers as orders
from jobs.store.job_store import JobStore
from jobs.store.workers import WorkerStatus, read_statuses
from tests.support.killable_valkey import KillableValkey
from tests.support.worker_processes import (
    QUEUE,
    REQUEST,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)
from worker.consumer.heartbeat import Heartbeat
from worker.process.drain import Drain
from worker.process.redis_retry import RedisOutage


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(redis_url, tmp_path)
    yield workers
    workers.stop()


def wait_for_states(redis: Redis, *expected: str, seconds: float = 60) -> tuple[WorkerStatus, ...]:
    wait_until(
        lambda: sorted(each.state for each in read_statuses(redis)) == sorted(expected),
        seconds,
        f"the workers are {expected}",
        lambda: str(read_statuses(redis)),
        every_s=0.05,
    )
    return read_statuses(redis)


def test_a_drained_worker_ends_its_job_and_takes_no_other_until_it_is_to_resume(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    first, second = store.create(REQUEST, QUEUE).job, store.create(REQUEST, QUEUE).job
    process = workers.start(0.5)
    wait_for(store, first.id, is_denoising)
    (before,) = catalog.read(redis).offers
    orders.order(redis, before.worker_id, "ops", drained=True)
    (status,) = wait_for_states(redis, "draining")
    assert status.job_id == first.id
    assert catalog.read(redis).offers == ()
    (status,) = wait_for_states(redis, "drained")
    assert (status.worker_id, status.job_id, status.withheld) == (before.worker_id, None, before)
    assert store.get(first.id).state is JobState.SUCCEEDED
    time.sleep(2.5)  # two of its waits for a job
    assert store.get(second.id).state is JobState.QUEUED
    assert process.poll() is None
    orders.order(redis, before.worker_id, "ops", drained=False)
    assert wait_for(store, second.id, has_ended).worker == before.worker_id
    wait_for_states(redis, "idle")
    assert catalog.read(redis).offers == (before,)


def test_other_workers_go_on_and_sigterm_ends_a_drained_one(
    workers: WorkerProcesses, store: JobStore, redis: Redis
) -> None:
    first = workers.start(0)
    wait_for_states(redis, "idle")
    (drained,) = catalog.read(redis).offers
    workers.start(0)
    wait_for_states(redis, "idle", "idle")
    orders.order(redis, drained.worker_id, "ops", drained=True)
    wait_for_states(redis, "drained", "idle")
    jobs = [store.create(REQUEST, QUEUE).job for _ in range(3)]
    for job in jobs:
        assert wait_for(store, job.id, has_ended).worker != drained.worker_id
    first.send_signal(signal.SIGTERM)
    assert first.wait(10) == 0
    assert redis.get(redis_keys.worker_drain(drained.worker_id)) is None, "it ends with its worker"
    wait_for_states(redis, "idle")


def test_a_drained_worker_stays_drained_when_redis_comes_back_without_the_order(
    killable_valkey: KillableValkey, tmp_path: Path
) -> None:
    workers = WorkerProcesses(killable_valkey.url, tmp_path)
    with connect(killable_valkey.url) as redis:
        try:
            workers.start(0)
            (status,) = wait_for_states(redis, "idle")
            orders.order(redis, status.worker_id, "ops", drained=True)
            wait_for_states(redis, "drained")
            killable_valkey.kill()
            time.sleep(2)
            killable_valkey.start()
            redis.flushall()
            (status,) = wait_for_states(redis, "drained")
            job = JobStore(redis).create(REQUEST, QUEUE).job
            time.sleep(2.5)
            assert JobStore(redis).get(job.id).state is JobState.QUEUED
            assert orders.read_orders(redis, [status.worker_id])[status.worker_id].by == "ops"
            orders.order(redis, status.worker_id, "ops", drained=False)
            assert wait_for(JobStore(redis), job.id, has_ended).state is JobState.SUCCEEDED
        finally:
            workers.stop()


def test_an_order_ends_with_a_killed_worker(
    workers: WorkerProcesses, redis: Redis, store: JobStore
) -> None:
    process = workers.start(0)
    (status,) = wait_for_states(redis, "idle")
    orders.order(redis, status.worker_id, "ops", drained=True)
    wait_for_states(redis, "drained")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    lives_s = redis.ttl(redis_keys.worker_drain(status.worker_id))
    assert 0 < lives_s <= redis_keys.DRAIN_TTL_S
    workers.start(0)  # it starts afresh, under another id
    job = store.create(REQUEST, QUEUE).job
    assert wait_for(store, job.id, has_ended).state is JobState.SUCCEEDED


def test_the_order_is_for_live_workers_only(redis: Redis) -> None:
    with pytest.raises(WorkerNotFound, match="no live worker gone"):
        orders.order(redis, "gone", "ops", drained=True)
    assert redis.get(redis_keys.worker_drain("gone")) is None


def test_an_order_that_cannot_be_read_changes_nothing(redis: Redis, offer: WorkerOffer) -> None:
    drain, key = Drain(), redis_keys.worker_drain(offer.worker_id)

    def status() -> WorkerStatus:
        state = "idle" if drain.order is None else "drained"
        return WorkerStatus.model_validate({"worker_id": offer.worker_id, "state": state})

    heartbeat = Heartbeat(redis, offer, None, status, RedisOutage(), 0.05)
    heartbeat.follow_orders_for(drain)
    with heartbeat:
        redis.set(key, b'{"drained": "perhaps"}')
        time.sleep(0.3)
        assert catalog.read(redis).offers == (offer,)
        given = orders.order(redis, offer.worker_id, "ops", drained=True)
        wait_until(lambda: catalog.read(redis).offers == ())
        redis.set(key, b"\xff")
        wait_until(lambda: redis.get(key) == given.model_dump_json().encode())
        assert drain.order == given
        assert redis.ttl(key) > redis_keys.DRAIN_TTL_S - 5
