"""Test that the tokens of prompts are counted with the tokenizer that a worker has published."""

import json
import logging
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer, queue_name
from service.api.deps import AppState
from service.app import create_app
from service.lookups.token_counter import MAX_TOKENIZERS, TokenCounter
from service.maintenance.tasks import background_tasks
from service.settings import ServiceSettings

TOKENIZER = Path(__file__).parents[3] / "models" / "wan-mini" / "tokenizer" / "tokenizer.json"
BOUND = 64


@pytest.fixture
def text() -> bytes:
    return TOKENIZER.read_bytes()


@pytest.fixture
def counting_worker(redis: Redis, offer: WorkerOffer, text: bytes) -> WorkerOffer:
    """A live worker that takes 64 tokens and has published its tokenizer."""
    name = catalog.tokenizer_fingerprint(text)
    bounds = {"tokenizer": name, "max_prompt_tokens": BOUND}
    model = offer.model.model_copy(update={**bounds, "max_prompt_chars": 400})
    offer = offer.model_copy(update={"model": model, "queue": queue_name(model, offer.modes)})
    catalog.publish_tokenizer(redis, name, text)
    catalog.publish(redis, offer)
    return offer


@pytest.mark.usefixtures("counting_worker")
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_of_too_many_tokens_is_refused_and_nothing_queued(
    client: TestClient, redis: Redis, field: str
) -> None:
    # 63 words and the end-of-sequence token: as many as the text encoder takes.
    fits = {"prompt": "a circle", field: " ".join(["red"] * (BOUND - 1))}
    answer = client.post("/generate", json={**fits, field: fits[field] + " red"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"] == [
        {
            "field": field,
            "value": "65 tokens",
            "bound": "at most 64 tokens",
            "detail": f"{field} has 65 tokens, which is more than 64; shorten it.",
        }
    ]
    assert (
        redis.keys("rq:*") == redis.keys("wan:jobs:*") == redis.keys(redis_keys.record("*")) == []
    )
    assert client.post("/generate", json=fits).status_code == 202


def test_without_the_tokenizer_nothing_is_refused(
    redis: Redis,
    counting_worker: WorkerOffer,
    settings: ServiceSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "0" * 64
    model = counting_worker.model.model_copy(update={"tokenizer": name})
    catalog.publish(redis, counting_worker.model_copy(update={"model": model}))
    with TestClient(create_app(settings)) as client, caplog.at_level(logging.WARNING):
        assert client.post("/generate", json={"prompt": "red " * 99}).status_code == 202
    assert f"Tokenizer {name} is not in Redis" in caplog.text


@pytest.mark.usefixtures("counting_worker")
def test_the_model_list_names_the_bound(client: TestClient, text: bytes) -> None:
    (model,) = client.get("/models").json()["models"]
    assert model["max_prompt_tokens"] == BOUND
    assert model["tokenizer"] == catalog.tokenizer_fingerprint(text)


def test_a_tokenizer_is_read_once(redis: Redis, text: bytes) -> None:
    name, counter = catalog.tokenizer_fingerprint(text), TokenCounter(redis)
    catalog.publish_tokenizer(redis, name, text)
    assert counter.count(name, "red") == 2
    redis.delete(redis_keys.tokenizer(name))
    assert counter.count(name, "red red") == 3


def test_a_prepared_tokenizer_waits_for_no_request(redis: Redis, text: bytes) -> None:
    name, counter = catalog.tokenizer_fingerprint(text), TokenCounter(redis)
    catalog.publish_tokenizer(redis, name, text)
    counter.prepare([name])
    redis.delete(redis_keys.tokenizer(name))
    assert counter.count(name, "red") == 2


@pytest.fixture
def three(redis: Redis, text: bytes) -> list[str]:
    """The names of three tokenizers in Redis, one more than are kept."""
    texts = [text + b"\n" * n for n in range(MAX_TOKENIZERS + 1)]
    names = [catalog.tokenizer_fingerprint(each) for each in texts]
    for name, each in zip(names, texts, strict=True):
        catalog.publish_tokenizer(redis, name, each)
    return names


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the tokenizers that are read from now on."""
    reads: list[str] = []
    read = catalog.read_tokenizer

    def noted(redis: Redis, name: str) -> str | None:
        reads.append(name)
        return read(redis, name)

    monkeypatch.setattr(catalog, "read_tokenizer", noted)
    return reads


def test_they_are_prepared_one_at_a_time_and_no_more_than_are_kept(
    redis: Redis, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, reads = TokenCounter(redis), reads_of(monkeypatch)
    for expected in (three[:1], three[:2], three[:2]):
        counter.prepare([three[0], *three])  # several workers have the first
        assert reads == expected


def test_what_had_to_go_is_not_prepared_again(
    redis: Redis, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = TokenCounter(redis)
    counter.prepare(three[:1])
    counter.prepare(three[:2])
    assert counter.count(three[2], "red") == 2  # evicts the first
    reads = reads_of(monkeypatch)
    counter.prepare(three[:2])
    assert reads == []


def test_one_that_is_published_late_is_prepared_then(
    redis: Redis, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    name, counter = catalog.tokenizer_fingerprint(text), TokenCounter(redis)
    counter.prepare([name])
    assert not caplog.records, "logged every few seconds, it would fill the log"
    catalog.publish_tokenizer(redis, name, text)
    counter.prepare([name])
    redis.delete(redis_keys.tokenizer(name))
    assert counter.count(name, "red") == 2


@pytest.mark.usefixtures("counting_worker")
def test_a_service_prepares_those_of_live_offers(settings: ServiceSettings) -> None:
    app_state: AppState = create_app(settings).state.app_state
    (task,) = (task for task in background_tasks(app_state) if task.name == "tokenizers")
    task.work(threading.Event())
    name = app_state.catalog.get().offers[0].model.tokenizer
    assert name is not None
    app_state.redis.delete(redis_keys.tokenizer(name))
    assert app_state.token_counter.count(name, "red") == 2


def test_one_that_comes_late_is_found(redis: Redis, text: bytes) -> None:
    name, counter = catalog.tokenizer_fingerprint(text), TokenCounter(redis)
    assert counter.count(name, "red") is None
    catalog.publish_tokenizer(redis, name, text)
    assert counter.count(name, "red") == 2


def test_only_the_last_few_are_kept(redis: Redis, three: list[str]) -> None:
    counter = TokenCounter(redis)
    for name in three:
        assert counter.count(name, "red") == 2
        redis.delete(redis_keys.tokenizer(name))
    assert counter.count(three[0], "red") is None
    assert counter.count(three[1], "red") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"version": "99"},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
    ],
    ids=["not read", "a panic when it is read", "a panic when it encodes"],
)
def test_an_unreadable_tokenizer_counts_nothing(
    redis: Redis, text: bytes, caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    text = json.dumps(json.loads(text) | change).encode()
    name = catalog.tokenizer_fingerprint(text)
    catalog.publish_tokenizer(redis, name, text)
    assert TokenCounter(redis).count(name, "red") is None
    assert f"Tokenizer {name} cannot be read" in caplog.text
