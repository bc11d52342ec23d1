"""Test signing in and out over HTTP: the cookie, who is answered, and what the cookie opens."""

import json
import logging
import signal
from collections.abc import Mapping
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from service.app import create_app
from service.auth.api_keys import KeyStore, Role
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey, SignIn, cookie_in
from tests.support.http_service import address, service, serving
from tests.support.sse_client import parse

ASK = {"prompt": "a small red circle"}


def token_of(key: Mapping[str, str]) -> str:
    return key["Authorization"].removeprefix("Bearer ")


def test_the_life_of_a_session(client: TestClient, make_key: MakeKey, redis: Redis) -> None:
    alice = make_key("alice")
    assert client.get("/session").status_code == 401
    answer = client.post("/session", json={"key": token_of(alice)})
    who = {"name": "alice", "role": "user", "open": False}
    assert (answer.status_code, answer.json()) == (200, who)
    assert answer.headers["cache-control"] == "no-store"
    # From here on the client sends the cookie by itself, as a browser does.
    page = {"Sec-Fetch-Site": "same-origin"}
    assert client.get("/session").json() == who
    assert client.get("/jobs").status_code == 200
    assert redis.keys("wan:session:*")
    out = client.delete("/session", headers=page)
    assert (out.status_code, out.text) == (204, "")
    assert not client.cookies
    assert redis.keys("wan:session:*") == []
    assert client.get("/session").status_code == 401
    assert client.delete("/session").status_code == 204


def test_the_key_may_come_in_the_header_and_the_body_goes_first(
    client: TestClient, make_key: MakeKey
) -> None:
    alice, root = make_key("alice"), make_key("root", Role.OPS)
    by_header = client.post("/session", headers=root)
    assert by_header.json() == {"name": "root", "role": "ops", "open": False}
    client.cookies.clear()
    both = client.post("/session", json={"key": token_of(alice)}, headers=root)
    assert both.json()["name"] == "alice"


def test_who_am_i_by_a_key(client: TestClient, make_key: MakeKey) -> None:
    root = make_key("root", Role.OPS)
    answer = client.get("/session", headers=root)
    assert answer.json() == {"name": "root", "role": "ops", "open": False}
    assert "set-cookie" not in answer.headers


def test_an_open_service_needs_no_session(client: TestClient) -> None:
    who = {"name": "local", "role": "ops", "open": True}
    for answer in (
        client.get("/session"),
        client.get("/session", headers={"Cookie": f"wan_session={'0' * 64}"}),
        client.post("/session"),
        client.post("/session", json={"key": "unused"}),
    ):
        assert (answer.status_code, answer.json()) == (200, who)
        assert "set-cookie" not in answer.headers
    for query in ("", "?all=true"):
        assert client.delete(f"/session{query}").status_code == 204


@pytest.mark.parametrize(
    ("public_url", "base_url", "secure"),
    [
        ("https://video.example", "http://video.example", True),
        ("https://video.example/api", "http://localhost:8000", True),
        ("http://video.example", "http://video.example", False),
        (None, "http://localhost", False),
        (None, "https://localhost", True),
    ],
)
def test_the_flags_of_the_cookie(
    settings: ServiceSettings,
    make_key: MakeKey,
    public_url: str | None,
    base_url: str,
    secure: bool,
) -> None:
    key = make_key("alice")
    app = create_app(settings.model_copy(update={"public_url": public_url}))
    with TestClient(app, base_url=base_url) as client:
        made = client.post("/session", headers=key)
        page = {"Cookie": cookie_in(made), "Sec-Fetch-Site": "same-origin"}
        client.cookies.clear()
        ended = client.delete("/session", headers=page)
    for answer, age in ((made, redis_keys.SESSION_LONGEST_S), (ended, 0)):
        value, *flags = answer.headers["set-cookie"].split("; ")
        assert value.startswith("wan_session=")
        assert {flag.lower() for flag in flags} == {
            *("httponly", "samesite=lax", "path=/", f"max-age={age}"),
            *({"secure"} if secure else ()),
        }


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", (401, None)),
        (b"{}", "application/json", (422, "key")),
        (b'{"key": null}', "application/json", (422, "key")),
        (b'{"key": ["SECRET"]}', "application/json", (422, "key")),
        (b'{"key": "SECRET", "SECRET": 1}', "application/json", (422, "body")),
        (b'{"SECRET": "SECRET"}', "application/json", (422, "body")),
        (b'"SECRET"', "application/json", (422, "body")),
        (b'{"key": "SECRET', "application/json", (422, "body")),
        (b'{"key": "SECRET"}', "text/plain", (415, None)),
        (b"key=SECRET", "application/x-www-form-urlencoded", (415, None)),
        (b'{"key": "\xff"}', "application/json", (400, None)),
        (b'{"key": "SECRET"}', "application/json", (401, None)),
        (b'{"key": ""}', "application/json", (401, None)),
        (b'{"key": "' + b"SECRET" * 10_000 + b'"}', "application/json", (401, None)),
    ],
    ids=lambda value: f"{len(value)} {value[:28]!r}" if isinstance(value, bytes) else None,
)
def test_bad_attempts_are_refused_and_not_repeated(
    client: TestClient,
    make_key: MakeKey,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    kind: str,
    status: tuple[int, str | None],
) -> None:
    """`status` is that of the answer, with the field that it names."""
    make_key("alice")
    with caplog.at_level(logging.DEBUG, logger="service"):
        answer = client.post("/session", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status[0], answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "set-cookie" not in answer.headers
    if status[1] is not None:
        assert [each["field"] for each in answer.json()["errors"]] == [status[1]]
    for text in (answer.text, caplog.text):
        assert "SECRET" not in text


def test_too_many_attempts_are_refused(client: TestClient, make_key: MakeKey) -> None:
    alice = make_key("alice")
    for _ in range(30):
        assert client.post("/session", json={"key": "guess"}).status_code == 401
    answer = client.post("/session", headers=alice)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_sign_ins")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert client.get("/jobs", headers=alice).status_code == 200


@pytest.mark.usefixtures("live_worker")
def test_what_the_cookie_opens(
    client: TestClient, make_key: MakeKey, make_job: MakeJob, sign_in: SignIn
) -> None:
    alice = sign_in(make_key("alice"))
    root = sign_in(make_key("root", Role.OPS))
    hers, his = make_job("alice", video=True), make_job("bob", video=True)
    asked = client.post("/generate", json=ASK, headers=alice)
    assert (asked.status_code, asked.json()["owner"]) == (202, "alice")
    for path, statuses in (
        ("/jobs", (200, 200)),
        ("/models", (200, 200)),
        (f"/jobs/{hers.id}", (200, 200)),
        (f"/jobs/{his.id}", (404, 200)),
        (f"/jobs/{hers.id}/video.mp4", (200, 200)),
        (f"/jobs/{his.id}/video.mp4", (404, 200)),
        (f"/jobs/{hers.id}/video.mp4?expires=1&signature=00", (200, 200)),
        (f"/jobs/{hers.id}/events", (200, 200)),
        (f"/jobs/{his.id}/events", (404, 200)),
        ("/workers", (403, 200)),
        ("/metrics", (403, 200)),
        # Clients of OpenAI's API are no browsers.
        ("/v1/videos", (401, 401)),
        (f"/v1/videos/{hers.id}/content", (401, 401)),
    ):
        found = [client.get(path, headers=each).status_code for each in (alice, root)]
        assert tuple(found) == statuses, path
    assert client.post("/v1/videos", json=ASK, headers=alice).status_code == 401
    assert client.delete(f"/v1/videos/{hers.id}", headers=root).status_code == 401
    assert client.delete(f"/jobs/{asked.json()['id']}", headers=alice).status_code == 200


def test_a_key_goes_before_a_cookie(client: TestClient, make_key: MakeKey, sign_in: SignIn) -> None:
    root = make_key("root", Role.OPS)
    alice = sign_in(make_key("alice"))
    cookie = {"Cookie": alice["Cookie"]}
    assert client.get("/session", headers=cookie | root).json()["name"] == "root"
    assert client.get("/workers", headers=cookie | root).status_code == 200
    wrong = {"Authorization": "Bearer wan_nobody"}
    assert client.get("/session", headers=cookie | wrong).status_code == 401
    # Nothing else in Authorization is a key: a proxy may ask for a password of its own.
    for other in ("Basic YWxpY2U6c2VjcmV0", "Bearer", "Bearer  "):
        answer = client.get("/session", headers=cookie | {"Authorization": other})
        assert answer.json()["name"] == "alice"


def test_signing_in_again_ends_the_session_before(
    client: TestClient, make_key: MakeKey, sign_in: SignIn
) -> None:
    alice, bob = make_key("alice"), make_key("bob")
    first = sign_in(alice)
    second = sign_in(bob | first)
    assert client.get("/session", headers=first).status_code == 401
    assert client.get("/session", headers=second).json()["name"] == "bob"
    # An attempt that fails ends nothing.
    assert client.post("/session", json={"key": "guess"}, headers=second).status_code == 401
    assert client.get("/session", headers=second).status_code == 200


def test_signing_out_everywhere(client: TestClient, make_key: MakeKey, sign_in: SignIn) -> None:
    alice, bob = make_key("alice"), make_key("bob")

    def signed_in(*pages: dict[str, str]) -> list[bool]:
        return [client.get("/session", headers=page).status_code == 200 for page in pages]

    laptop, phone, his = sign_in(alice), sign_in(alice), sign_in(bob)
    answer = client.delete("/session?all=true", headers=phone)
    assert answer.status_code == 204
    assert "max-age=0" in answer.headers["set-cookie"].lower()
    assert signed_in(laptop, phone, his) == [False, False, True]
    # The key does it, too, when the device is out of reach.
    laptop = sign_in(alice)
    assert client.delete("/session", headers=alice).status_code == 204
    assert signed_in(laptop) == [True]
    assert client.delete("/session?all=true", headers=alice).status_code == 204
    assert signed_in(laptop, his) == [False, True]
    assert client.delete("/session?all=true", headers=laptop).status_code == 401
    assert client.delete("/session?all=true").status_code == 401
    asked = client.delete("/session?all=maybe", headers=alice)
    assert (asked.status_code, asked.json()["errors"][0]["bound"]) == (422, "true or false")


def test_a_revoked_key_and_an_ended_session_are_401_at_the_next_request(
    client: TestClient, make_key: MakeKey, key_store: KeyStore, redis: Redis, sign_in: SignIn
) -> None:
    alice, bob = sign_in(make_key("alice")), sign_in(make_key("bob"))
    key_store.revoke("alice")
    wait_until(lambda: client.get("/session", headers=alice).status_code == 401, 3)
    assert client.get("/session", headers=bob).status_code == 200
    redis.delete(*redis.keys("wan:session:*"))
    answer = client.get("/session", headers=bob)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert "sign in again" in answer.json()["detail"]


@pytest.mark.usefixtures("live_worker")
def test_quotas_count_for_the_key(client: TestClient, make_key: MakeKey, sign_in: SignIn) -> None:
    key = make_key("alice", quota=1)
    page = sign_in(key)
    statuses = [
        client.post("/generate", json=ASK, headers=each).status_code for each in (page, key)
    ]
    assert statuses == [202, 429]


def test_an_event_stream_with_the_cookie(
    settings: ServiceSettings, make_key: MakeKey, make_job: MakeJob, store: JobStore
) -> None:
    alice, bob = make_key("alice"), make_key("bob")
    job = make_job("alice")
    with (
        serving(settings) as site,
        httpx2.Client(base_url=site.url, trust_env=False, timeout=20) as client,
    ):
        cookies = {}
        for name, key in (("alice", alice), ("bob", bob)):
            cookies[name] = {"Cookie": cookie_in(client.post("/session", headers=key))}
            client.cookies.clear()
        path = f"/jobs/{job.id}/events"
        assert client.get(path).status_code == 401
        assert client.get(path, headers=cookies["bob"]).status_code == 404
        with client.stream("GET", path, headers=cookies["alice"]) as answer:
            assert answer.status_code == 200
            events = (each for each in parse(answer.iter_lines()) if each.event == "state")
            assert next(events).kind_and_state == ("state", "queued")
            store.cancel(job.id)
            assert [each.kind_and_state for each in events] == [("state", "cancelled")]


def test_redis_away_is_503(
    settings: ServiceSettings, make_key: MakeKey, sign_in: SignIn, unused_port: int
) -> None:
    key = make_key("alice")
    page = sign_in(key)
    url = SecretStr(f"redis://127.0.0.1:{unused_port}/0")
    away = settings.model_copy(update={"host": "0.0.0.0", "redis_url": url})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        for method, headers in (("POST", key), ("GET", page), ("DELETE", page)):
            answer = client.request(method, "/session", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] == "5"
            # A browser that loses its cookie here would leave a session that it cannot end.
            assert "set-cookie" not in answer.headers
        assert client.get("/jobs", headers=page).status_code == 503
        assert client.get("/session").status_code == 401


def test_a_full_redis_makes_no_session_and_keeps_those_there_are(
    client: TestClient, make_key: MakeKey, redis: Redis, sign_in: SignIn
) -> None:
    key = make_key("alice")
    page = sign_in(key)
    redis.config_set("maxmemory", 1)
    try:
        assert client.post("/session", headers=key).status_code == 503
        assert client.get("/session", headers=page).status_code == 200
        assert client.delete("/session", headers=page).status_code == 204
    finally:
        redis.config_set("maxmemory", 0)
    assert client.get("/session", headers=page).status_code == 401


def test_processes_share_sessions_which_outlive_them_and_nothing_secret_is_logged(
    redis_url: str, redis: Redis, make_key: MakeKey, live_worker: WorkerOffer, tmp_path: Path
) -> None:
    key = make_key("alice")
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_PORT": "0",
        "LOG_FORMAT": "json",
    }
    with service(**environment) as first, service(**environment) as second:
        here, there = address(first), address(second)
        with httpx2.Client(trust_env=False, timeout=20) as client:
            made = client.post(f"{here}/session", json={"key": token_of(key)})
            client.cookies.clear()
            page = {"Cookie": cookie_in(made), "Sec-Fetch-Site": "same-origin"}
            for url in (here, there):
                assert client.get(f"{url}/session", headers=page).json()["name"] == "alice"
            first.send_signal(signal.SIGTERM)
            _, log = first.communicate(timeout=20)
            with service(**environment) as third:
                again = address(third)
                assert client.get(f"{again}/session", headers=page).status_code == 200
                catalog.publish(redis, live_worker)  # it may have lapsed: three starts take time
                assert client.post(f"{again}/generate", json=ASK, headers=page).status_code == 202
                # The one signs out, and the other knows at once.
                assert client.delete(f"{again}/session", headers=page).status_code == 204
                assert client.get(f"{there}/session", headers=page).status_code == 401
                client.post(f"{again}/session", json={"key": [token_of(key)]})
                client.post(f"{again}/session", content=token_of(key))
                client.post(f"{again}/session", json={"key": token_of(key)[:-1]})
                client.get(f"{again}/session?key={token_of(key)}")
                unread = token_of(make_key("bob"))
                redis.set(redis_keys.API_KEYS, "no hash")  # Redis refuses to read a key from it
                refused = client.post(f"{again}/session", json={"key": unread})
                assert refused.status_code == 503
                third.send_signal(signal.SIGTERM)
                log += third.communicate(timeout=20)[1]
    lines = [json.loads(line) for line in log.splitlines()]
    assert "alice signed in from 127.0.0.1" in [line["message"] for line in lines]
    assert "Redis failed" in log
    for secret in (token_of(key)[-64:-1], unread[-64:], page["Cookie"].partition("=")[2]):
        assert secret not in log
