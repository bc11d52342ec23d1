"""Test authentication: open and locked services, good and bad keys, and which jobs are shown."""

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.errors import Unauthenticated
from jobs.store.job_store import JobStore
from service.app import create_app
from service.auth.api_keys import KeyStore, Role
from service.auth.gate import KEY_CACHED_S, LOCAL, Gate
from service.auth.rate_limit import RateLimiter
from service.auth.sessions import SessionStore
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey

ASK = {"prompt": "a small red circle"}


def test_without_keys_on_loopback_everybody_is_local(
    client: TestClient, live_worker: WorkerOffer
) -> None:
    # Some clients always send a key.
    for headers in ({}, {"Authorization": "Bearer unused"}):
        job = client.post("/generate", json=ASK, headers=headers).json()
        assert job["owner"] == "local"
        assert client.get(f"/jobs/{job['id']}", headers=headers).status_code == 200


def test_without_keys_beyond_loopback_nobody_is_let_in(settings: ServiceSettings) -> None:
    exposed = settings.model_copy(update={"host": "0.0.0.0"})
    with TestClient(create_app(exposed)) as client:
        assert client.get("/jobs").status_code == 401
        assert client.get("/healthz").status_code == 200


class Now:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def gate(redis: Redis, key_store: KeyStore, now: Now) -> Gate:
    """The gate of a service on loopback."""
    rates = RateLimiter(redis, "600/minute")
    return Gate(key_store, rates, SessionStore(redis), may_be_open=True, clock=now)


def refused(gate: Gate, token: str | None) -> bool:
    try:
        gate.admit(token)
    except Unauthenticated:
        return True
    return False


def test_the_first_key_locks_the_service(gate: Gate, now: Now, key_store: KeyStore) -> None:
    assert gate.admit(None) is LOCAL
    _, alice = key_store.add("alice", Role.USER)
    now.s += KEY_CACHED_S - 0.01
    assert gate.is_open
    assert gate.admit(None) is LOCAL
    now.s += 0.01
    assert not gate.is_open
    assert refused(gate, None)
    assert gate.admit(alice).name == "alice"


def test_a_revoked_key_closes_the_service_as_well(
    settings: ServiceSettings, key_store: KeyStore
) -> None:
    """Whoever once made keys does not want it open."""
    key_store.add("alice", Role.USER)
    key_store.revoke("alice")
    with TestClient(create_app(settings)) as client:
        assert client.get("/jobs").status_code == 401


def test_a_redis_that_lost_its_keys_does_not_open_the_door(
    gate: Gate, now: Now, key_store: KeyStore, redis: Redis
) -> None:
    _, alice = key_store.add("alice", Role.USER)
    assert gate.admit(alice).name == "alice"
    redis.delete(redis_keys.API_KEYS)
    now.s += KEY_CACHED_S
    assert refused(gate, None)
    assert refused(gate, alice)


def test_a_revoked_key_works_two_seconds_at_most(gate: Gate, now: Now, key_store: KeyStore) -> None:
    _, alice = key_store.add("alice", Role.USER)
    assert gate.admit(alice).name == "alice"
    key_store.revoke("alice")
    now.s += KEY_CACHED_S
    assert refused(gate, alice)


def test_a_rotated_key_works_at_once_and_its_old_secret_two_seconds_at_most(
    gate: Gate, now: Now, key_store: KeyStore
) -> None:
    _, old = key_store.add("alice", Role.USER)
    assert gate.admit(old).name == "alice"
    _, new = key_store.rotate("alice")
    assert gate.admit(new).name == "alice"
    now.s += KEY_CACHED_S
    assert refused(gate, old)
    assert gate.admit(new).name == "alice"


def test_missing_wrong_and_revoked_keys_get_the_same_status(
    client: TestClient, make_key: MakeKey, key_store: KeyStore
) -> None:
    alice, bob = make_key("alice")["Authorization"], make_key("bob")["Authorization"]
    key_store.revoke("bob")
    unknown_id = alice.replace(alice.split("_")[1], "0" * 12)
    wrong_secret = alice[:-1] + ("0" if alice[-1] != "0" else "1")
    answers = [
        client.get("/jobs", headers={"Authorization": each})
        for each in (unknown_id, wrong_secret, bob)
    ]
    missing = client.get("/jobs")
    for answer in (missing, *answers):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    assert "python -m service keys add" in missing.json()["detail"]
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer  ",
        b"Basic YWxpY2U6c2VjcmV0",
        b"Bearer wan_x_y",
        b"Bearer \x00",
        b"Bearer wan_\x00123456789ab_" + b"0" * 64,
        b"Bearer \xff\xfe\xfd",
        "Bearer wan_💥".encode(),
        b"Bearer wan_0123456789ab_" + "٠".encode() * 64,
        b"\x00",
        b"Bearer wan_" + b"a" * 100_000,
        b"Bearer " + b"0 " * 50_000,
        b"Bearer wan_0123456789ab_" + b"0" * 64 + b", Bearer x",
    ],
    ids=lambda header: f"{header[:26]!r}, {len(header)} bytes",
)
def test_odd_authorization_headers_are_401(
    client: TestClient, make_key: MakeKey, header: bytes
) -> None:
    make_key("alice")
    answer = client.get("/jobs", headers=[(b"authorization", header)])
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(client: TestClient, make_key: MakeKey, scheme: str) -> None:
    token = make_key("alice")["Authorization"].split()[1]
    assert client.get("/jobs", headers={"Authorization": f"{scheme} {token}"}).status_code == 200


def test_a_stranger_is_turned_away_before_anything_is_read(
    client: TestClient, make_key: MakeKey
) -> None:
    make_key("alice")
    assert client.post("/generate", content=b"{no json").status_code == 401
    assert client.get("/jobs", params={"limit": "x"}).status_code == 401
    assert client.get("/jobs/none").status_code == 401


def test_use_is_noted_but_not_every_time(
    client: TestClient, make_key: MakeKey, key_store: KeyStore, redis: Redis
) -> None:
    alice = make_key("alice")
    (key,) = key_store.all()
    assert key_store.last_uses() == {}
    assert client.get("/jobs", headers=alice).status_code == 200
    assert list(key_store.last_uses()) == [key.id]
    redis.delete(redis_keys.API_KEYS_USED)
    assert client.get("/jobs", headers=alice).status_code == 200
    assert key_store.last_uses() == {}


def test_what_is_remembered_is_bounded(
    redis: Redis, key_store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.auth.gate.MAX_CACHED_KEYS", 3)
    gate = Gate(key_store, RateLimiter(redis, "600/minute"), SessionStore(redis), may_be_open=False)
    tokens = [key_store.add(f"k{n}", Role.USER)[1] for n in range(5)]
    for _ in range(2):
        assert [gate.admit(token).name for token in tokens] == [f"k{n}" for n in range(5)]
    with pytest.raises(Unauthenticated):
        gate.admit("wan_0123456789ab_" + "0" * 64)


def test_owners_see_their_own_jobs_and_ops_see_all(
    client: TestClient, make_key: MakeKey, make_job: MakeJob
) -> None:
    alice, bob, ops = make_key("alice"), make_key("bob"), make_key("root", Role.OPS)
    hers, his = make_job("alice"), make_job("bob")

    def listed(headers: dict[str, str], **parameters: str) -> set[str]:
        answer = client.get("/jobs", headers=headers, params=parameters)
        assert answer.status_code == 200, answer.text
        return {job["id"] for job in answer.json()["jobs"]}

    assert listed(alice) == listed(alice, owner="alice") == {hers.id}
    assert listed(bob) == {his.id}
    assert listed(ops) == {hers.id, his.id}
    assert listed(ops, owner="bob") == listed(ops, owner="bob", state="queued") == {his.id}
    assert listed(ops, owner="nobody") == set()
    assert listed(ops, owner="\x00💥:all") == set()
    refused = client.get("/jobs", headers=alice, params={"owner": "bob"})
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert client.get(f"/jobs/{his.id}", headers=ops).json()["owner"] == "bob"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        *("/jobs/{}", "/jobs/{}/video.mp4", "/jobs/{}/events"),
        *("/v1/videos/{}", "/v1/videos/{}/content"),
    ],
)
def test_somebody_elses_job_looks_like_none(
    client: TestClient,
    make_key: MakeKey,
    make_job: MakeJob,
    store: JobStore,
    method: str,
    path: str,
) -> None:
    bob = make_key("bob")
    hers = make_job("alice", video=True)
    purged = make_job("bob")
    store.purge(purged.id)
    foreign = client.request(method, path.format(hers.id), headers=bob)
    unknown = client.request(method, path.format(purged.id), headers=bob)
    assert foreign.status_code == unknown.status_code
    assert foreign.text.replace(hers.id, "") == unknown.text.replace(purged.id, "")
    # The headers reveal nothing either; the request's id differs for each.
    assert foreign.headers.pop("x-request-id") != unknown.headers.pop("x-request-id")
    assert dict(foreign.headers) == dict(unknown.headers)


def test_ops_go_first(
    client: TestClient, make_key: MakeKey, store: JobStore, live_worker: WorkerOffer
) -> None:
    for name, role, priority in (("alice", Role.USER, False), ("root", Role.OPS, True)):
        headers = make_key(name, role)
        job = client.post("/generate", json=ASK, headers=headers).json()
        record = store.get(job["id"])
        assert (record.owner, record.priority, job["owner"]) == (name, priority, name)
