"""Test that the offer is in the catalog while the worker lives, even if Redis loses its data."""

from pathlib import Path

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.catalog import WorkerOffer
from jobs.store.workers import WorkerStateName, WorkerStatus, read_statuses
from worker.consumer.heartbeat import Heartbeat
from worker.process.ready_file import VARIABLE, ReadyFile, why_not_ready
from worker.process.redis_retry import RedisOutage

TEXT = b'{"version": "1.0"}'


def status() -> WorkerStatus:
    return WorkerStatus(worker_id="worker-1", state="idle")


def test_offer_tokenizer_and_status_come_back_after_redis_lost_its_data(
    redis: Redis, offer: WorkerOffer
) -> None:
    name = catalog.tokenizer_fingerprint(TEXT)
    model = offer.model.model_copy(update={"tokenizer": name})
    offer = offer.model_copy(update={"model": model})
    with Heartbeat(redis, offer, TEXT, status, RedisOutage(), publish_every_s=0.05):
        assert catalog.read(redis).offers == (offer,)
        assert catalog.read_tokenizer(redis, name) == TEXT.decode()
        redis.flushdb()
        wait_until(lambda: catalog.read(redis).offers == (offer,))
        wait_until(lambda: read_statuses(redis) == (status(),))
        assert catalog.read_tokenizer(redis, name) == TEXT.decode()
    assert catalog.read(redis).offers == ()
    assert read_statuses(redis) == ()


def test_a_worker_without_a_tokenizer_text_stores_none(redis: Redis, offer: WorkerOffer) -> None:
    with Heartbeat(redis, offer, None, status, RedisOutage()):
        assert catalog.read(redis).offers == (offer,)
        assert not list(redis.scan_iter("wan:tokenizer:*"))


def test_a_closed_offer_leaves_the_status_until_the_end(redis: Redis, offer: WorkerOffer) -> None:
    with Heartbeat(redis, offer, None, status, RedisOutage(), publish_every_s=60) as heartbeat:
        heartbeat.close()
        wait_until(lambda: catalog.read(redis).offers == ())
        assert read_statuses(redis) == (status(),)
    assert read_statuses(redis) == ()


@pytest.mark.parametrize("state", ["draining", "drained", "degraded"])
def test_a_worker_that_takes_no_jobs_has_a_status_and_no_offer(
    redis: Redis, offer: WorkerOffer, state: WorkerStateName
) -> None:
    now = [status()]
    with Heartbeat(
        redis, offer, None, lambda: now[0], RedisOutage(), publish_every_s=60
    ) as heartbeat:
        assert catalog.read(redis).offers == (offer,)
        now[0] = WorkerStatus(worker_id="worker-1", state=state)
        heartbeat.refresh()
        wait_until(lambda: read_statuses(redis) == (now[0],))
        assert catalog.read(redis).offers == ()
        now[0] = status()
        heartbeat.refresh()
        wait_until(lambda: catalog.read(redis).offers == (offer,))


def test_a_change_is_published_at_once(redis: Redis, offer: WorkerOffer) -> None:
    now = [status()]
    with Heartbeat(
        redis, offer, None, lambda: now[0], RedisOutage(), publish_every_s=60
    ) as heartbeat:
        now[0] = status().model_copy(update={"state": "busy"})
        heartbeat.refresh()
        wait_until(lambda: read_statuses(redis) == (now[0],))


def test_probes_are_told_the_same_as_the_catalog(
    redis: Redis, offer: WorkerOffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "ready"))
    now = [status()]
    heartbeat = Heartbeat(redis, offer, None, lambda: now[0], RedisOutage(), publish_every_s=60)
    heartbeat.ready_file = ReadyFile(tmp_path / "ready")
    with heartbeat:
        assert why_not_ready() is None
        for state in ("degraded", "drained", "draining"):
            now[0] = status().model_copy(update={"state": state})
            heartbeat.refresh()
            wait_until(lambda: why_not_ready() is not None)
            now[0] = status()
            heartbeat.refresh()
            wait_until(lambda: why_not_ready() is None)
        heartbeat.close()
        wait_until(lambda: why_not_ready() is not None)
    assert not (tmp_path / "ready").exists()
