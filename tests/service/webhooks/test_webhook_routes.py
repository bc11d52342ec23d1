"""Test `webhook_url` in a request, and what its job shows of the webhook."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Outbox, Outcome
from service.app import create_app
from service.settings import ServiceSettings

PENDING = {"tries": 0, "last_status": None, "last_error": None, "delivered_at": None}


@pytest.fixture
def allowing(webhook_settings: ServiceSettings, live_worker: WorkerOffer) -> TestClient:
    """The service with a host that may be called; no dispatcher runs, so no status changes."""
    return TestClient(create_app(webhook_settings))


@pytest.fixture
def nothing_enqueued(redis: Redis) -> Iterator[None]:
    yield
    assert list(redis.scan_iter(redis_keys.record("*"))) == []


def ask(client: TestClient, url: object, **more: object) -> Any:
    return client.post("/generate", json={"prompt": "x", "webhook_url": url, **more})


def test_accepted(allowing: TestClient, hook: str, store: JobStore) -> None:
    answer = ask(allowing, hook)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["webhook"] == {"url": hook, "state": "pending", **PENDING}
    assert store.get(job["id"]).webhook_url == hook
    # It says nothing of the video.
    assert "webhook_url" not in job["request"]
    assert allowing.get(f"/jobs/{job['id']}").json()["webhook"] == job["webhook"]


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "webhook_url": None}])
def test_without_one(allowing: TestClient, body: dict[str, object]) -> None:
    answer = allowing.post("/generate", json=body)
    assert answer.status_code == 202
    assert answer.json()["webhook"] is None


def test_the_state_is_shown_everywhere(
    allowing: TestClient, hook: str, redis: Redis, store: JobStore
) -> None:
    first, _, third = (ask(allowing, url).json()["id"] for url in (hook, None, hook))
    store.cancel(first)
    outbox = Outbox(redis)
    (lease,) = outbox.take(1)
    outbox.settle(lease, Outcome(500, "answered 500", retry_in_s=60))
    expected = {**PENDING, "tries": 1, "last_status": 500, "last_error": "answered 500"}
    shown = allowing.get(f"/jobs/{first}").json()["webhook"]
    assert shown == {"url": hook, "state": "pending", **expected}
    listed = [job["webhook"] for job in allowing.get("/jobs").json()["jobs"]]
    assert listed == [{"url": hook, "state": "pending", **PENDING}, None, shown]
    assert allowing.delete(f"/jobs/{first}").json()["webhook"] == shown
    assert allowing.delete(f"/jobs/{third}").json()["webhook"]["tries"] == 0


@pytest.mark.usefixtures("nothing_enqueued")
def test_refused_where_nothing_is_allowed(client: TestClient, live_worker: WorkerOffer) -> None:
    answer = ask(client, "https://hooks.example.com/")
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == "webhook_url"
    assert error["value"] == "https://hooks.example.com/"
    assert "SERVICE_WEBHOOK_HOSTS" in error["detail"]


@pytest.mark.usefixtures("nothing_enqueued")
@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example.com/",
        "",
        "http://127.0.0.1/",
        "https://user@hooks.example.com/",
        7,
        [],
        "https://hooks.example.com/\ud800",
        "https://hooks.example.com/" + "x" * 5000,
    ],
)
def test_refused_with_everything_else(allowing: TestClient, url: object) -> None:
    # json.dumps escapes lone surrogates, which the client's own encoder would refuse.
    body = json.dumps({"prompt": "", "seed": -1, "webhook_url": url})
    headers = {"content-type": "application/json"}
    answer = allowing.post("/generate", content=body, headers=headers)
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} == {
        "prompt",
        "seed",
        "webhook_url",
    }


def test_the_calls_are_described(allowing: TestClient) -> None:
    document = allowing.get("/openapi.json").json()
    calls = document["paths"]["/generate"]["post"]["callbacks"]["job-ended"]
    operation = calls["{$request.body#/webhook_url}"]["post"]
    assert [each["name"] for each in operation["parameters"]] == [
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    ]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["data"]["$ref"] == "#/components/schemas/JobView"
    assert "webhook_url" in document["components"]["schemas"]["GenerationBody"]["properties"]
