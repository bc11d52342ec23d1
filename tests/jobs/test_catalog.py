"""Test offers (publishing, expiry, withdrawal), queue names, tokenizers and statuses."""

import json
import logging
import time
from typing import Any

import pytest
from pydantic import ValidationError
from redis import Redis

from jobs import catalog, redis_keys
from jobs.catalog import ModelOffer, WordGroup, WorkerOffer
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.workers import ModeStatus, WorkerStatus, publish_status, read_statuses


def test_published_offer_is_read_back(redis: Redis, offer: WorkerOffer) -> None:
    catalog.publish(redis, offer)
    found = catalog.read(redis)
    assert found.offers == (offer,)
    assert found.waiting == {offer.queue: 0}
    assert found.known == {("wan-mini", "bf16"), ("wan-mini", "w8a8")}
    assert found.served() == [{"model": "wan-mini", "modes": ["bf16", "w8a8"]}]
    assert 0 < redis.ttl(redis_keys.worker_offer(offer.worker_id)) <= redis_keys.OFFER_TTL_S


def test_waiting_counts_queued_jobs(
    redis: Redis, store: JobStore, live_worker: WorkerOffer, request_for_video: GenerationRequest
) -> None:
    store.create(request_for_video, live_worker.queue)
    assert catalog.read(redis).waiting == {live_worker.queue: 1}


def test_offer_that_is_not_renewed_is_gone_but_known(redis: Redis, offer: WorkerOffer) -> None:
    catalog.publish(redis, offer)
    redis.delete(redis_keys.worker_offer(offer.worker_id))  # as its time to live would
    found = catalog.read(redis)
    assert found.offers == ()
    assert ("wan-mini", "w8a8") in found.known


def test_withdrawn_offer_is_gone_but_known(redis: Redis, offer: WorkerOffer) -> None:
    catalog.publish(redis, offer)
    catalog.withdraw(redis, offer.worker_id)
    found = catalog.read(redis)
    assert (found.offers, found.models) == ((), ())
    assert ("wan-mini", "bf16") in found.known
    assert redis.zcard(redis_keys.WORKERS) == 0


def test_dead_workers_and_old_modes_are_removed(redis: Redis, offer: WorkerOffer) -> None:
    redis.zadd(redis_keys.WORKERS, {"ancient": 1.0})
    redis.zadd(redis_keys.KNOWN_MODES, {'["old", "mode"]': 1.0})
    catalog.publish(redis, offer)
    assert redis.zrange(redis_keys.WORKERS, 0, -1) == [offer.worker_id.encode()]
    assert ("old", "mode") not in catalog.read(redis).known


def test_a_host_whose_clock_is_ahead_removes_no_other_worker(
    redis: Redis, offer: WorkerOffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.publish(redis, offer)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 90 * 24 * 3600)
    ahead = offer.model_copy(update={"worker_id": "worker-2"})
    catalog.publish(redis, ahead)
    publish_status(redis, WorkerStatus(worker_id="worker-2", state="idle"))
    found = catalog.read(redis)
    assert found.offers == (offer, ahead)
    assert len(found.known) == len(offer.modes)
    ranked: Any = redis.zrange(redis_keys.WORKERS, 0, -1, withscores=True)
    scores = [score for _, score in ranked]
    assert max(scores) - min(scores) < 3600


def test_unreadable_offer_does_not_hide_the_others(
    redis: Redis, offer: WorkerOffer, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.publish(redis, offer)
    redis.zadd(redis_keys.WORKERS, {"newer": 9e9})
    redis.set(redis_keys.worker_offer("newer"), '{"worker_id": "newer"}')
    with caplog.at_level(logging.WARNING):
        assert catalog.read(redis).offers == (offer,)
    assert "newer" in caplog.text


def test_offers_of_the_next_version_are_read_without_what_is_new(
    redis: Redis, offer: WorkerOffer
) -> None:
    catalog.publish(redis, offer)
    key = redis_keys.worker_offer(offer.worker_id)
    text = json.loads(redis.get(key) or b"")
    for part in (text, text["model"], *text["modes"]):
        part["surprise"] = {"of": "the next version"}
    redis.set(key, json.dumps(text))
    assert catalog.read(redis).offers == (offer,)
    status = WorkerStatus(worker_id=offer.worker_id, state="idle")
    publish_status(redis, status)
    key = redis_keys.worker_status(offer.worker_id)
    redis.set(key, json.dumps(json.loads(redis.get(key) or b"") | {"surprise": 1}))
    assert read_statuses(redis) == (status,)


def test_an_offer_of_another_format_is_named_once_and_skipped(
    redis: Redis, offer: WorkerOffer, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.publish(redis, offer)
    catalog.publish(redis, offer.model_copy(update={"worker_id": "of-version-2"}))
    key = redis_keys.worker_offer("of-version-2")
    redis.set(key, json.dumps(json.loads(redis.get(key) or b"") | {"format": "2"}))
    for _ in range(3):
        assert catalog.read(redis).offers == (offer,)
    assert caplog.text.count("offer of worker of-version-2") == 1


def test_queue_name_depends_on_every_part_of_the_offer(
    model: ModelOffer, offer: WorkerOffer
) -> None:
    name = catalog.queue_name(model, offer.modes)
    assert name == offer.queue
    assert name.startswith("wan-mini.")
    assert catalog.queue_name(model, tuple(reversed(offer.modes))) == name
    others = [
        catalog.queue_name(model, offer.modes[:1]),
        catalog.queue_name(model.model_copy(update={"max_frames": 21}), offer.modes),
        catalog.queue_name(model.model_copy(update={"fingerprint": "sha256:01"}), offer.modes),
        catalog.queue_name(
            model, [mode.model_copy(update={"variant": "cached"}) for mode in offer.modes]
        ),
    ]
    assert len({name, *others}) == 5


def test_queue_name_does_not_depend_on_texts_and_defaults(
    model: ModelOffer, offer: WorkerOffer
) -> None:
    """Otherwise waiting jobs would never run after a description was changed."""
    words = WordGroup(kind="colour", phrases=("red",))
    texts = {"default_negative_prompt": "dark", "vocabulary": (words,), "prompt_template": "COLOUR"}
    changed = model.model_copy(update={"default_steps": 4, "example_prompts": ("red",), **texts})
    modes = [mode.model_copy(update={"description": "new"}) for mode in offer.modes]
    assert catalog.queue_name(changed, modes) == offer.queue


def test_tokenizer_is_stored_once_and_kept_alive(redis: Redis) -> None:
    text = '{"version": "1.0", "text": "ü"}'
    name = catalog.tokenizer_fingerprint(text.encode())
    assert catalog.read_tokenizer(redis, name) is None
    catalog.publish_tokenizer(redis, name, text.encode())
    assert catalog.read_tokenizer(redis, name) == text
    redis.expire(redis_keys.tokenizer(name), 60)
    catalog.publish_tokenizer(redis, name, text.encode())
    assert 60 < redis.ttl(redis_keys.tokenizer(name)) <= redis_keys.TOKENIZER_TTL_S


def test_tokenizer_of_another_content_is_none(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    name = catalog.tokenizer_fingerprint(b"one")
    redis.set(redis_keys.tokenizer(name), "another")
    assert catalog.read_tokenizer(redis, name) is None
    assert name in caplog.text


def test_queue_name_depends_on_the_bound_in_tokens_but_not_the_tokenizer(
    model: ModelOffer, offer: WorkerOffer
) -> None:
    named = model.model_copy(update={"tokenizer": "0" * 64})
    assert catalog.queue_name(named, offer.modes) == offer.queue
    bounded = model.model_copy(update={"max_prompt_tokens": 64})
    assert catalog.queue_name(bounded, offer.modes) != offer.queue


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"default_size": "1x1"}, "default_size 1x1"),
        ({"default_frames": 21}, "default_frames 21"),
        ({"default_frames": 16}, "default_frames 16"),
        ({"default_steps": 51}, "default_steps 51"),
        ({"default_steps": 0}, "default_steps 0"),
        ({"name": "Wan 2.1"}, "name"),
        ({"sizes": ("96X96",)}, "sizes"),
        ({"tokenizer": "../x"}, "tokenizer"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
    ],
)
def test_contradictory_model_is_refused(
    model: ModelOffer, change: dict[str, object], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        ModelOffer.model_validate(model.model_dump() | change)


def test_known_modes_of_another_version_are_left_out(redis: Redis, offer: WorkerOffer) -> None:
    catalog.publish(redis, offer)
    known = catalog.read(redis).known
    odd = (b"junk", b"\xff", b"7", b'["a"]', b'["a", "b", "c"]', b'["a", {}]', b"[" * 5000)
    redis.zadd(redis_keys.KNOWN_MODES, dict.fromkeys(odd, time.time()))
    redis.zadd(redis_keys.WORKERS, {b"\xff": time.time()})
    found = catalog.read(redis)
    assert (found.known, found.offers) == (known, (offer,))
    assert read_statuses(redis) == ()


def test_worker_must_serve_its_default_mode(offer: WorkerOffer) -> None:
    with pytest.raises(ValidationError, match="default_mode bf16 is not among"):
        WorkerOffer.model_validate(offer.model_dump() | {"modes": [offer.modes[1].model_dump()]})


def status(worker_id: str = "worker-1") -> WorkerStatus:
    modes = {"w8a8": ModeStatus(step_s=0.5, saturated_share=0.001, flushed_share=0.01)}
    return WorkerStatus(worker_id=worker_id, state="busy", job_id="j", jobs_done=3, modes=modes)


def test_the_status_of_a_worker_is_read_until_it_is_gone(redis: Redis, offer: WorkerOffer) -> None:
    catalog.publish(redis, offer)
    publish_status(redis, status())
    assert read_statuses(redis) == (status(),)
    assert 0 < redis.ttl(redis_keys.worker_status("worker-1")) <= redis_keys.OFFER_TTL_S
    catalog.close(redis, "worker-1")
    assert catalog.read(redis).offers == ()
    assert read_statuses(redis) == (status(),)
    catalog.withdraw(redis, "worker-1")
    assert read_statuses(redis) == ()
    assert not redis.exists(redis_keys.worker_status("worker-1"))


def test_a_status_of_another_version_does_not_hide_the_others(
    redis: Redis, offer: WorkerOffer
) -> None:
    catalog.publish(redis, offer)
    catalog.publish(redis, offer.model_copy(update={"worker_id": "worker-2"}))
    redis.set(redis_keys.worker_status("worker-1"), '{"future": 1}')
    publish_status(redis, status("worker-2"))
    assert read_statuses(redis) == (status("worker-2"),)
