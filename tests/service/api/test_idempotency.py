"""Test `Idempotency-Key` on `POST /generate`: the same key and body make one job."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from service.auth.api_keys import Role
from tests.service.conftest import MakeKey

BODY = {"prompt": "a small red circle", "mode": "bf16"}


def ask(client: TestClient, key: str | bytes, body: Any = BODY, **headers: str) -> httpx2.Response:
    named: Any = {"Idempotency-Key": key, **headers}
    return client.post("/generate", json=body, headers=named)


def jobs_of(store: JobStore) -> list[str]:
    return [job.id for job in store.list().jobs]


@pytest.mark.usefixtures("live_worker")
def test_the_same_key_and_body_are_answered_with_the_same_job(
    client: TestClient, store: JobStore
) -> None:
    first = ask(client, "k")
    assert "idempotent-replayed" not in first.headers
    job_id = first.json()["id"]
    store.claim(job_id, "w")
    # Other whitespace and another order of the keys do not make another document.
    text = b'{ "mode": "bf16",\n "prompt": "a small red circle" }'
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    again = client.post("/generate", content=text, headers=headers)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.headers["location"] == first.headers["location"] == f"/jobs/{job_id}"
    # The answer has the current state, with the seed that was drawn at first.
    assert again.json()["state"] == "running"
    assert again.json()["request"] == first.json()["request"]
    assert jobs_of(store) == [job_id]


@pytest.mark.usefixtures("live_worker")
def test_another_body_is_refused(client: TestClient, store: JobStore) -> None:
    job_id = ask(client, "k").json()["id"]
    others: list[Any] = [BODY | {"seed": 7}, BODY | {"mode": "w8a8"}, {"prompt": 5}, []]
    for body in others:
        refused = ask(client, "k", body)
        assert refused.status_code == 409
        problem = refused.json()
        assert (problem["code"], problem["job_id"]) == ("idempotency_conflict", job_id)
    assert jobs_of(store) == [job_id]


@pytest.mark.usefixtures("live_worker")
def test_other_keys_and_none_make_other_jobs(client: TestClient, store: JobStore) -> None:
    made = [ask(client, "k"), ask(client, "K")]
    made += [client.post("/generate", json=BODY) for _ in range(2)]
    assert len({answer.json()["id"] for answer in made}) == len(jobs_of(store)) == 4


def test_a_replay_needs_no_worker(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    first = ask(client, "k")
    catalog.withdraw(redis, live_worker.worker_id)
    assert client.post("/generate", json=BODY).status_code == 503
    assert ask(client, "k").json()["id"] == first.json()["id"]
    assert ask(client, "other").status_code == 503


@pytest.mark.usefixtures("live_worker")
def test_a_refused_request_uses_no_key_up(client: TestClient) -> None:
    assert ask(client, "k", BODY | {"num_frames": 16}).status_code == 422
    assert ask(client, "k").status_code == 202


@pytest.mark.usefixtures("live_worker")
def test_each_owner_has_keys_of_its_own(client: TestClient, make_key: MakeKey) -> None:
    ann, ops = make_key("ann"), make_key("ops", Role.OPS)
    first = ask(client, "k", **ann).json()["id"]
    assert ask(client, "k", **ops).json()["id"] != first
    assert ask(client, "k", **ann).json()["id"] == first


@pytest.mark.usefixtures("live_worker")
def test_a_deleted_job_is_not_answered(client: TestClient, store: JobStore) -> None:
    first = ask(client, "k").json()["id"]
    store.purge(first)
    again = ask(client, "k")
    assert again.json()["id"] != first
    assert "idempotent-replayed" not in again.headers


@pytest.mark.usefixtures("live_worker")
def test_many_at_once_make_one_job(client: TestClient, store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, "k"), range(24)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == len(jobs_of(store)) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("key", ["!", "~" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"'])
def test_visible_characters_are_a_key(client: TestClient, key: str) -> None:
    assert ask(client, key).json()["id"] == ask(client, key).json()["id"]


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "a\tb", "ä".encode(), b"\xff", b"a\x7f"])
def test_anything_else_is_refused(client: TestClient, store: JobStore, key: str | bytes) -> None:
    refused = ask(client, key)
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    (error,) = refused.json()["errors"]
    assert error["field"] == "Idempotency-Key"
    assert error["bound"] == "1 to 255 visible ASCII characters"
    assert jobs_of(store) == []
