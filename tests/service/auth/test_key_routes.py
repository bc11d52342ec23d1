"""Test the routes of API keys: what operators see and change, and what they may not."""

import logging
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.errors import KeyConflict
from service.auth.api_keys import KeyStore, Role, proves, split
from tests.service.conftest import MakeKey, SignIn

Headers = dict[str, str]


@pytest.fixture
def ops(make_key: MakeKey) -> Headers:
    return make_key("boss", Role.OPS)


def secret_in(key: str) -> str:
    parts = split(key)
    assert parts is not None, key
    return parts[1]


def test_a_key_is_made_and_works_and_its_secret_is_shown_once(
    client: TestClient, ops: Headers, key_store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"name": "ci", "role": "user", "quota": 7, "rate": "9/second", "expires": "30d"}
    with caplog.at_level(logging.INFO, "service.audit"):
        answer = client.post("/keys", json=body, headers=ops)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    secret = secret_in(made["key"])
    assert proves(secret, key_store.get(made["id"]))
    assert (made["state"], made["own"], made["last_used_at"]) == ("usable", False, None)
    used = client.get("/session", headers={"Authorization": f"Bearer {made['key']}"})
    assert used.json()["name"] == "ci"
    listed = client.get("/keys", headers=ops)
    assert secret not in listed.text
    boss, ci = listed.json()["keys"]
    assert (boss["name"], boss["own"], boss["role"]) == ("boss", True, "ops")
    assert boss["last_used_at"] is not None
    assert (ci["quota"], ci["rate"], ci["owner"], ci["own"]) == (7, "9/second", "ci", False)
    assert ci["expires_at"] > ci["created_at"]
    assert (listed.json()["default_quota"], listed.json()["default_rate"]) == (20, "600/minute")
    (line,) = [each.getMessage() for each in caplog.records if each.name == "service.audit"]
    assert line.startswith("boss (key ")
    assert "made the key of ci (id " in line
    assert secret not in caplog.text


def test_a_key_is_changed_where_it_says_so(
    client: TestClient, ops: Headers, key_store: KeyStore
) -> None:
    made, _ = key_store.add("ci", Role.USER, quota=7, rate="9/second")
    answer = client.patch("/keys/ci", json={"quota": 8, "role": "ops"}, headers=ops)
    assert answer.status_code == 200
    changed = key_store.get(made.id)
    assert changed is not None
    assert (changed.quota, changed.rate, changed.role) == (8, "9/second", Role.OPS)
    defaults = {"quota": None, "rate": None, "expires": None, "role": "user"}
    view = client.patch(f"/keys/{made.id}", json=defaults, headers=ops).json()
    assert (view["quota"], view["rate"], view["role"], view["expires_at"]) == (
        *(None, None, "user"),
        None,
    )


def test_a_key_is_rotated_with_and_without_a_grace(
    client: TestClient, ops: Headers, key_store: KeyStore
) -> None:
    _, first = key_store.add("ci", Role.USER)
    second = client.post("/keys/ci/rotate", json={"grace": "1h"}, headers=ops).json()
    assert second["old_secret_until"] is not None
    key = key_store.get(second["id"])
    assert proves(secret_in(first), key)
    assert proves(secret_in(second["key"]), key)
    third = client.post("/keys/ci/rotate", headers=ops).json()
    key = key_store.get(third["id"])
    assert not proves(secret_in(second["key"]), key)
    assert proves(secret_in(third["key"]), key)


def test_a_revoked_key_stays_in_the_list(
    client: TestClient, ops: Headers, key_store: KeyStore
) -> None:
    key_store.add("ci", Role.USER)
    revoked = client.post("/keys/ci/revoke", headers=ops).json()
    assert (revoked["state"], revoked["revoked_at"] is None) == ("revoked", False)
    assert client.post("/keys/ci/revoke", headers=ops).json() == revoked
    assert client.get("/keys", headers=ops).json()["keys"][1] == revoked
    for method, path in (("PATCH", "/keys/ci"), ("POST", "/keys/ci/rotate")):
        body = {} if "rotate" in path else {"quota": 1}
        answer = client.request(method, path, json=body, headers=ops)
        assert (answer.status_code, answer.json()["code"]) == (409, "key_conflict")


@pytest.mark.parametrize("by_session", [False, True])
def test_nobody_takes_their_own_key_out_of_service(
    client: TestClient,
    ops: Headers,
    key_store: KeyStore,
    make_key: MakeKey,
    sign_in: SignIn,
    by_session: bool,
) -> None:
    make_key("other", Role.OPS)
    headers = sign_in(ops) if by_session else ops
    before = key_store.all()
    for path, body in (("/keys/boss/revoke", None), ("/keys/boss", {"role": "user"})):
        method = "PATCH" if body else "POST"
        answer = client.request(method, path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "key_conflict")
        assert "sent with" in answer.json()["detail"]
    assert key_store.all() == before
    # Other changes of it are its own business.
    assert client.patch("/keys/boss", json={"quota": 5}, headers=headers).status_code == 200


def test_the_last_usable_key_of_operators_stays(redis: Redis, key_store: KeyStore) -> None:
    """Two operators revoke each other at the same time: the second one is refused."""
    one, _ = key_store.add("one", Role.OPS)
    two, _ = key_store.add("two", Role.OPS)
    KeyStore(redis, by=one.id).revoke("two")
    with pytest.raises(KeyConflict, match="last usable one"):
        KeyStore(redis, by=two.id).revoke("one")
    with pytest.raises(KeyConflict, match="last usable one"):
        KeyStore(redis, by=two.id).change("one", role=Role.USER)
    assert key_store.revoke("one").revoked_at is not None, "the command line may"


def test_the_first_key_of_an_open_service_is_for_operators(
    client: TestClient, key_store: KeyStore
) -> None:
    answer = client.post("/keys", json={"name": "alice"})
    assert (answer.status_code, answer.json()["code"]) == (409, "key_conflict")
    assert "Make a key of the role ops first" in answer.json()["detail"]
    assert not key_store.any_was_made()
    assert client.post("/keys", json={"name": "boss", "role": "ops"}).status_code == 201


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["name"]),
        ([], ["body"]),
        (
            {"name": 1, "role": "king", "quota": "x", "expires": 3},
            ["quota", "expires", "name", "role"],
        ),
        ({"name": "a b", "quota": 0, "rate": "often"}, ["name", "quota", "rate"]),
        ({"name": "local"}, ["name"]),
        ({"name": "ci", "owner": "a b"}, ["owner"]),
        ({"name": "ci", "expires": "soon"}, ["expires"]),
        ({"name": "ci", "expires": "2020-01-01"}, ["expires"]),
        ({"name": "ci", "colour": "red"}, ["colour"]),
    ],
)
def test_refused_fields_are_named_and_nothing_is_made(
    client: TestClient, ops: Headers, key_store: KeyStore, body: Any, fields: list[str]
) -> None:
    answer = client.post("/keys", json=body, headers=ops)
    assert answer.status_code == 422
    assert sorted(each["field"] for each in answer.json()["errors"]) == sorted(fields)
    assert len(key_store.all()) == 1


@pytest.mark.parametrize(
    ("path", "body", "refusal"),
    [
        ("PATCH /keys/boss", {}, (422, "invalid_spec")),
        ("PATCH /keys/boss", {"role": None}, (422, "invalid_spec")),
        ("PATCH /keys/boss", {"name": "x"}, (422, "invalid_spec")),
        ("PATCH /keys/nobody", {"quota": 1}, (404, "key_not_found")),
        ("POST /keys/nobody/rotate", None, (404, "key_not_found")),
        ("POST /keys/nobody/revoke", None, (404, "key_not_found")),
        ("POST /keys/boss/rotate", {"grace": "31d"}, (422, "invalid_spec")),
        ("POST /keys/boss/rotate", {"grace": "long"}, (422, "invalid_spec")),
        ("POST /keys", {"name": "boss"}, (409, "key_conflict")),
    ],
)
def test_what_cannot_be_is_a_problem_and_changes_nothing(
    client: TestClient,
    ops: Headers,
    key_store: KeyStore,
    path: str,
    body: Any,
    refusal: tuple[int, str],
) -> None:
    before = key_store.all()
    method, address = path.split(" ")
    answer = client.request(method, address, json=body, headers=ops)
    assert (answer.status_code, answer.json()["code"]) == refusal, answer.text
    assert key_store.all() == before


def test_the_description_has_the_bodies(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for model in ("KeyBody", "KeyChangesBody", "RotateBody"):
        assert "properties" in document["components"]["schemas"][model]
    body = document["paths"]["/keys"]["post"]["requestBody"]
    assert cast("dict[str, Any]", body)["required"] is True
