"""The standing offer: in the catalog while the worker lives, whatever happens to Redis's data."""

import time
from collections.abc import Callable

from redis import Redis

from jobs import catalog
from jobs.catalog import WorkerOffer
from worker.offering import StandingOffer

TEXT = '{"version": "1.0"}'


def wait_until(what: Callable[[], bool], limit_s: float = 5) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_offer_and_tokenizer_come_back_after_redis_lost_its_data(
    redis: Redis, offer: WorkerOffer
) -> None:
    name = catalog.tokenizer_fingerprint(TEXT)
    with StandingOffer(redis, offer, TEXT, repeat_every_s=0.05):
        assert catalog.read(redis).offers == (offer,)
        assert catalog.read_tokenizer(redis, name) == TEXT
        redis.flushdb()
        wait_until(lambda: catalog.read(redis).offers == (offer,))
        assert catalog.read_tokenizer(redis, name) == TEXT
    assert catalog.read(redis).offers == ()


def test_a_worker_without_a_tokenizer_text_stores_none(redis: Redis, offer: WorkerOffer) -> None:
    with StandingOffer(redis, offer, None):
        assert catalog.read(redis).offers == (offer,)
        assert not list(redis.scan_iter("wan:tokenizer:*"))
