"""Test keys over their life: changed terms, expiry, rotation with a grace, several per owner."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.errors import InvalidSpec, KeyConflict
from service.auth import api_keys
from service.auth.api_keys import KeyStore, Role, proves, split
from service.auth.gate import KEY_CACHED_S, Gate
from service.auth.key_terms import parse_expiry, parse_span
from tests.service.auth.test_api_keys import command
from tests.service.conftest import MakeJob, MakeKey, SignIn

ASK = {"prompt": "a small red circle"}
HOUR = timedelta(hours=1)


class Clock:
    """The time as the keys see it, and as the cache of keys does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
        self.now = datetime(2026, 11, 30, 12, tzinfo=UTC)
        self._monotonic_s = 1000.0
        monkeypatch.setattr(api_keys, "now", lambda: self.now)
        monkeypatch.setattr(gate, "_clock", lambda: self._monotonic_s)

    def pass_(self, time: timedelta) -> None:
        self.now += time
        self._monotonic_s += time.total_seconds()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, client: TestClient) -> Clock:
    return Clock(monkeypatch, cast("FastAPI", client.app).state.app_state.gate)


def secret_of(token: str) -> str:
    parts = split(token)
    assert parts is not None
    return parts[1]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_keys_of_earlier_versions_stay_valid(
    client: TestClient, key_store: KeyStore, redis: Redis
) -> None:
    made, token = key_store.add("alice", Role.USER)
    fields: dict[str, Any] = json.loads(redis.hget(redis_keys.API_KEYS, made.id))  # type: ignore[arg-type]
    for new in ("owner", "expires_at", "old_secret_sha256", "old_secret_until"):
        del fields[new]
    redis.hset(redis_keys.API_KEYS, made.id, json.dumps(fields))
    assert key_store.get(made.id) == made
    assert client.get("/session", headers=bearer(token)).json()["name"] == "alice"


def test_terms_are_changed_one_by_one_within_two_seconds(
    client: TestClient, key_store: KeyStore, clock: Clock
) -> None:
    _, token = key_store.add("alice", Role.USER, quota=3, rate="100/minute")
    assert client.get("/metrics", headers=bearer(token)).status_code == 403
    changed = key_store.change("alice", role=Role.OPS)
    assert (changed.role, changed.quota, changed.rate) == (Role.OPS, 3, "100/minute")
    clock.pass_(timedelta(seconds=KEY_CACHED_S))
    assert client.get("/metrics", headers=bearer(token)).status_code == 200
    changed = key_store.change(changed.id, quota=None, rate="1/hour")
    assert (changed.role, changed.quota, changed.rate) == (Role.OPS, None, "1/hour")
    clock.pass_(timedelta(seconds=KEY_CACHED_S))
    statuses = [client.get("/jobs", headers=bearer(token)).status_code for _ in range(2)]
    assert statuses == [200, 429]


def test_a_changed_quota_counts_at_the_next_request(
    client: TestClient, key_store: KeyStore, live_worker: WorkerOffer, clock: Clock
) -> None:
    _, token = key_store.add("alice", Role.USER, quota=1)
    assert client.post("/generate", json=ASK, headers=bearer(token)).status_code == 202
    assert client.post("/generate", json=ASK, headers=bearer(token)).status_code == 429
    key_store.change("alice", quota=2)
    clock.pass_(timedelta(seconds=KEY_CACHED_S))
    assert client.post("/generate", json=ASK, headers=bearer(token)).status_code == 202


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"quota": 0}, "quota is 0"),
        ({"rate": "often"}, "'often' is not a rate"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "2020-01-01 00:00Z, which is not in"),
    ],
)
def test_terms_that_cannot_be_are_refused_and_change_nothing(
    key_store: KeyStore, terms: dict[str, Any], reason: str
) -> None:
    made, _ = key_store.add("alice", Role.USER)
    with pytest.raises(InvalidSpec, match=reason):
        key_store.change("alice", **terms)
    with pytest.raises(InvalidSpec, match=reason):
        key_store.add("bob", **{"role": Role.USER, **terms})
    assert key_store.all() == [made]


def test_a_revoked_key_is_not_changed(key_store: KeyStore) -> None:
    key_store.add("alice", Role.USER)
    key_store.revoke("alice")
    with pytest.raises(KeyConflict, match="revoked, and that is for good"):
        key_store.change("alice", role=Role.OPS)


def test_a_key_expires_with_its_sessions_and_can_be_extended(
    client: TestClient, key_store: KeyStore, clock: Clock, sign_in: SignIn
) -> None:
    _, token = key_store.add("alice", Role.USER, expires_at=clock.now + HOUR)
    session = sign_in(bearer(token))
    clock.pass_(HOUR - timedelta(seconds=1))
    for headers in (bearer(token), session):
        assert client.get("/jobs", headers=headers).status_code == 200
    clock.pass_(timedelta(seconds=1))
    for headers in (bearer(token), session):
        refused = client.get("/jobs", headers=headers)
        assert refused.status_code == 401
        assert "expired at 2026-11-30 13:00 UTC" in refused.json()["detail"]
    # A wrong secret learns nothing about the key.
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    assert "expired" not in client.get("/jobs", headers=bearer(wrong)).text
    key_store.change("alice", expires_at=None)
    clock.pass_(timedelta(seconds=KEY_CACHED_S))
    for headers in (bearer(token), session):
        assert client.get("/jobs", headers=headers).status_code == 200


def test_while_it_is_rotated_both_secrets_are_good(
    client: TestClient, key_store: KeyStore, clock: Clock, sign_in: SignIn
) -> None:
    _, first = key_store.add("alice", Role.USER)
    session = sign_in(bearer(first))
    _, second = key_store.rotate("alice", HOUR)
    for headers in (bearer(first), bearer(second), session):
        assert client.get("/jobs", headers=headers).status_code == 200
    clock.pass_(HOUR - timedelta(seconds=1))
    for headers in (bearer(first), bearer(second), session):
        assert client.get("/jobs", headers=headers).status_code == 200
    clock.pass_(timedelta(seconds=1))
    for headers, status in ((bearer(first), 401), (session, 401), (bearer(second), 200)):
        assert client.get("/jobs", headers=headers).status_code == status


def test_never_more_than_two_secrets_are_good(key_store: KeyStore, clock: Clock) -> None:
    _, first = key_store.add("alice", Role.USER)
    _, second = key_store.rotate("alice", HOUR)
    key, third = key_store.rotate("alice", HOUR)
    assert [proves(secret_of(each), key) for each in (first, second, third)] == [False, True, True]
    # After a leak nothing old is good: that is what no grace means.
    key, fourth = key_store.rotate("alice")
    assert [proves(secret_of(each), key) for each in (third, fourth)] == [False, True]


@pytest.mark.parametrize("grace", [timedelta(seconds=-1), timedelta(days=31)])
def test_a_grace_has_bounds(key_store: KeyStore, grace: timedelta) -> None:
    made, _ = key_store.add("alice", Role.USER)
    with pytest.raises(InvalidSpec, match="from 0 to 30 d"):
        key_store.rotate("alice", grace)
    assert key_store.all() == [made]


def test_a_person_keeps_the_jobs_when_the_key_is_replaced(
    client: TestClient, key_store: KeyStore, make_job: MakeJob, live_worker: WorkerOffer
) -> None:
    key_store.add("alice", Role.USER)
    job = make_job("alice")
    key_store.revoke("alice")
    made, token = key_store.add("alice-2027", Role.USER, quota=2, owner="alice")
    assert (made.name, made.owner_name) == ("alice-2027", "alice")
    new = bearer(token)
    assert client.get("/session", headers=new).json()["name"] == "alice"
    assert client.get(f"/jobs/{job.id}", headers=new).status_code == 200
    assert [each["id"] for each in client.get("/jobs", headers=new).json()["jobs"]] == [job.id]
    assert client.post("/generate", json=ASK, headers=new).json()["owner"] == "alice"
    # The quota is the person's: a second key gives no more.
    assert client.post("/generate", json=ASK, headers=new).status_code == 429


def test_keys_of_one_owner_see_the_same_and_others_nothing(
    client: TestClient, key_store: KeyStore, make_key: MakeKey, make_job: MakeJob
) -> None:
    laptop, ci = make_key("laptop", owner="alice"), make_key("ci", owner="alice")
    job = make_job("alice")
    for headers, status in ((laptop, 200), (ci, 200), (make_key("bob"), 404)):
        assert client.get(f"/jobs/{job.id}", headers=headers).status_code == status
    # Nobody becomes her by taking a name that was only an owner's.
    with pytest.raises(KeyConflict, match="whose jobs belong to alice"):
        key_store.add("alice", Role.USER)
    assert key_store.add("alice", Role.USER, owner="alice")[0].owner_name == "alice"


@pytest.mark.parametrize("owner", ["", "a b", "local", "0123456789ab", "x" * 65])
def test_an_owner_is_a_name(key_store: KeyStore, owner: str) -> None:
    with pytest.raises(InvalidSpec):
        key_store.add("alice", Role.USER, owner=owner)
    assert not key_store.any_was_made()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("never", None),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T18:00", datetime(2027, 1, 31, 18, tzinfo=UTC)),
        ("2027-01-31T18:00+02:00", datetime(2027, 1, 31, 16, tzinfo=UTC)),
    ],
)
def test_times_of_expiry(text: str, expected: datetime | None) -> None:
    assert parse_expiry(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "30", "-1d", "1w", "2027-13-01", "٣d", "999999d"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidSpec, match="30d, 12h or 90m"):
        parse_expiry(text)
    with pytest.raises(InvalidSpec, match="30d, 12h or 90m"):
        parse_span(text)


def test_the_command_line_changes_and_rotates(redis_url: str, key_store: KeyStore) -> None:
    added = command(redis_url, "add", "laptop", "--owner", "alice", "--expires", "30d")
    first = split(added.stdout.strip())
    assert first is not None, added.stderr
    changed = command(
        *(redis_url, "change", "laptop", "--role", "ops", "--quota", "9"),
        *("--rate", "5/second", "--expires", "2099-01-31"),
    )
    assert changed.returncode == 0, changed.stderr
    assert "usable until 2099-01-31 00:00Z" in changed.stdout
    second = split(command(redis_url, "rotate", "laptop", "--grace", "2h").stdout.strip())
    assert second is not None
    key = key_store.get(first[0])
    assert key is not None
    assert (key.role, key.quota, key.rate, key.owner_name) == (Role.OPS, 9, "5/second", "alice")
    assert proves(first[1], key)
    assert proves(second[1], key)
    listed = command(redis_url, "list").stdout.splitlines()[1]
    assert re.search(
        r"^laptop +alice +.* usable until 2099-01-31 00:00Z, old secret until 20.*Z$", listed
    )
    back = command(redis_url, "change", "laptop", "--quota", "default", "--expires", "never")
    assert back.returncode == 0, back.stderr
    key = key_store.get(first[0])
    assert key is not None
    assert (key.quota, key.rate, key.expires_at) == (None, "5/second", None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["change", "alice"], "nothing is to change"),
        (["change", "alice", "--quota", "-1"], "quota is -1"),
        (["change", "alice", "--expires", "2020-01-01"], "not in the future"),
        (["change", "nobody", "--quota", "1"], "no key with the name or id 'nobody'"),
        (["rotate", "alice", "--grace", "31d"], "from 0 to 30 d"),
        (["rotate", "alice", "--grace", "long"], "grace is long, which is not a number of days"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    redis_url: str, key_store: KeyStore, arguments: list[str], sentence: str
) -> None:
    made, _ = key_store.add("alice", Role.USER)
    done = command(redis_url, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("service: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert key_store.all() == [made]
