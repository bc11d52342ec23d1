"""Test the limits on requests and jobs of a key, and on the jobs that wait in a queue."""

import time

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.errors import RateLimited
from jobs.store.job_store import JobStore
from service.app import create_app
from service.auth.api_keys import Role
from service.auth.rate_limit import RateLimiter
from service.settings import ServiceSettings
from tests.service.conftest import MakeKey

ASK = {"prompt": "a small red circle"}


def test_a_key_that_exceeds_its_rate_gets_retry_after(
    client: TestClient, make_key: MakeKey
) -> None:
    alice, bob = make_key("alice", rate="3/minute"), make_key("bob")
    for _ in range(3):
        assert client.get("/jobs", headers=alice).status_code == 200
    for path in ("/jobs", "/models", "/jobs/none"):
        answer = client.get(path, headers=alice)
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
        wait_s = int(answer.headers["retry-after"])
        assert 1 <= wait_s <= 60
        assert answer.json()["retry_after_s"] == wait_s
        assert answer.headers["ratelimit-policy"] == '"key";q=3;w=60'
        assert answer.headers["ratelimit"] == f'"key";r=0;t={wait_s}'
    assert client.get("/jobs", headers=bob).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_requests_after_the_wait_are_admitted(redis: Redis) -> None:
    limiter = RateLimiter(redis, "5/second")
    for _ in range(5):
        limiter.count("alice", None)
    with pytest.raises(RateLimited) as refused:
        limiter.count("alice", None)
    wait_s = refused.value.context["retry_after_s"]
    assert isinstance(wait_s, int)
    time.sleep(wait_s + 0.05)
    limiter.count("alice", None)


def test_the_rate_holds_over_all_processes(settings: ServiceSettings, make_key: MakeKey) -> None:
    slow = settings.model_copy(update={"rate": "4/minute"})
    alice = make_key("alice")
    with TestClient(create_app(slow)) as one, TestClient(create_app(slow)) as two:
        statuses = [each.get("/jobs", headers=alice).status_code for each in (one, two) * 3]
    assert statuses == [200] * 4 + [429] * 2


def test_a_wrong_key_uses_up_nobodys_rate(client: TestClient, make_key: MakeKey) -> None:
    alice = make_key("alice", rate="2/minute")
    wrong = {"Authorization": alice["Authorization"][:-64] + "0" * 64}
    for _ in range(5):
        assert client.get("/jobs", headers=wrong).status_code == 401
    assert client.get("/jobs", headers=alice).status_code == 200


def test_an_open_service_counts_nothing(settings: ServiceSettings, redis: Redis) -> None:
    with TestClient(create_app(settings.model_copy(update={"rate": "1/day"}))) as client:
        assert [client.get("/jobs").status_code for _ in range(3)] == [200] * 3
    assert redis.keys("wan:rate*") == []


@pytest.mark.usefixtures("live_worker")
def test_a_key_may_have_so_many_jobs(
    settings: ServiceSettings, make_key: MakeKey, store: JobStore
) -> None:
    alice, bob, carl = make_key("alice"), make_key("bob", quota=1), make_key("carl")
    with TestClient(create_app(settings.model_copy(update={"quota": 2}))) as client:

        def ask(headers: dict[str, str]) -> tuple[int, str]:
            answer = client.post("/generate", json=ASK, headers=headers)
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["code"] == "quota_exceeded"
            return answer.status_code, answer.headers.get("location", "")

        (_, first), (status, _) = ask(alice), ask(alice)
        assert status == 202
        # Running jobs count as well.
        store.claim(first.removeprefix("/jobs/"), "w")
        assert ask(alice)[0] == 429
        assert [ask(bob)[0] for _ in range(2)] == [202, 429]
        assert ask(carl)[0] == 202
        # Jobs that have ended do not count.
        (waiting,) = client.get("/jobs?state=queued", headers=alice).json()["jobs"]
        client.delete(f"/jobs/{waiting['id']}", headers=alice)
        assert ask(alice)[0] == 202


@pytest.mark.usefixtures("live_worker")
def test_ops_have_a_quota_only_if_their_key_does(
    settings: ServiceSettings, make_key: MakeKey
) -> None:
    free, bound = make_key("free", Role.OPS), make_key("bound", Role.OPS, quota=1)
    with TestClient(create_app(settings.model_copy(update={"quota": 1}))) as client:
        for headers, expected in ((free, [202, 202, 202]), (bound, [202, 429, 429])):
            sent = [client.post("/generate", json=ASK, headers=headers) for _ in range(3)]
            assert [answer.status_code for answer in sent] == expected


@pytest.mark.usefixtures("live_worker")
def test_a_full_queue_takes_no_more(settings: ServiceSettings) -> None:
    with TestClient(create_app(settings.model_copy(update={"max_waiting": 2}))) as client:
        sent = [client.post("/generate", json=ASK) for _ in range(3)]
        assert [answer.status_code for answer in sent] == [202, 202, 429]
        assert sent[2].json()["code"] == "queue_full"
        assert int(sent[2].headers["retry-after"]) >= 1
        client.delete(sent[0].headers["location"])
        assert client.post("/generate", json=ASK).status_code == 202
