"""Test the store of sessions, what they may do, when they end, and the limits on signing in."""

import re
import time

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.errors import RateLimited, TooManySignIns, Unauthenticated
from service.auth.api_keys import KeyStore, Role, split
from service.auth.gate import KEY_CACHED_S, LOCAL, Gate
from service.auth.rate_limit import RateLimiter
from service.auth.sessions import MOST_SESSIONS, SessionStore, SessionToken


@pytest.fixture
def sessions(redis: Redis) -> SessionStore:
    return SessionStore(redis)


@pytest.fixture
def now() -> list[float]:
    """The seconds on the gate's clock."""
    return [1000.0]


@pytest.fixture
def gate(
    redis: Redis,
    key_store: KeyStore,
    sessions: SessionStore,
    now: list[float],
) -> Gate:
    rates = RateLimiter(redis, "600/minute")
    return Gate(key_store, rates, sessions, may_be_open=False, clock=lambda: now[0])


def sign_in(gate: Gate, token: str | None, address: str = "192.0.2.1") -> SessionToken:
    _, session = gate.sign_in(token, address)
    assert session is not None
    return session


def refused(gate: Gate, session: SessionToken) -> bool:
    try:
        gate.admit(session)
    except Unauthenticated:
        return True
    return False


def digests(redis: Redis, key_id: str) -> int:
    return int(redis.zcard(redis_keys.sessions_of(key_id)))


def ttl_s(redis: Redis, session: SessionToken) -> float:
    assert session.digest is not None
    return float(redis.pttl(redis_keys.session(session.digest))) / 1000


def test_a_session_is_its_key(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.OPS, quota=3)
    principal, session = gate.sign_in(token, "192.0.2.1")
    assert session is not None
    assert gate.admit(session) == gate.admit(token) == principal


def test_redis_holds_neither_the_id_nor_the_secret(
    gate: Gate, key_store: KeyStore, redis: Redis
) -> None:
    _, token = key_store.add("alice", Role.USER)
    first, second = sign_in(gate, token), sign_in(gate, token)
    assert first != second
    parts = split(token)
    assert parts is not None
    key_id, secret = parts
    assert re.fullmatch("[0-9a-f]{64}", first.text)
    held = ""
    for name in redis.keys("*"):
        held += str(name)
        if redis.type(name) == b"string":
            held += str(redis.get(name))
        elif redis.type(name) == b"zset":
            held += str(redis.zrange(name, 0, -1))
    assert first.digest is not None
    assert first.digest in held
    for each in (first.text, second.text, secret):
        assert each not in held
        assert each not in repr(first)
    assert ttl_s(redis, first) == pytest.approx(redis_keys.SESSION_IDLE_S, abs=5)
    assert redis.ttl(redis_keys.sessions_of(key_id)) == pytest.approx(
        redis_keys.SESSION_LONGEST_S, abs=5
    )


def test_forged_and_truncated_ids_are_refused(
    gate: Gate, key_store: KeyStore, sessions: SessionStore
) -> None:
    _, token = key_store.add("alice", Role.USER)
    session = sign_in(gate, token)
    while not re.search("[a-f]", session.text):  # its upper case has to be another text
        session = sign_in(gate, token)
    text = session.text
    for forged in (
        *(text[:-1], text[1:], text + "0", text + "\n", text.upper(), text * 2000),
        text[:-1] + ("0" if text[-1] != "0" else "1"),
        *("", "0" * 64, "٠" * 64, "\x00", "*"),
    ):
        assert refused(gate, SessionToken(forged)), forged
        sessions.end(SessionToken(forged))
    assert not refused(gate, session)


def test_the_digest_that_redis_holds_is_no_session(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.USER)
    session = sign_in(gate, token)
    assert session.digest is not None
    assert refused(gate, SessionToken(session.digest))
    assert refused(gate, SessionToken(token))
    with pytest.raises(Unauthenticated):
        gate.admit(session.text)  # a session is no key


def test_a_session_that_is_not_used_ends(redis: Redis) -> None:
    sessions = SessionStore(redis, idle_s=0.5, longest_s=60, renewed_every_s=0.1)
    used, unused = sessions.create("k", "s"), sessions.create("k", "s")
    for _ in range(5):
        time.sleep(0.2)
        assert sessions.read(used) is not None
    assert sessions.read(unused) is None


def test_a_session_ends_however_much_it_is_used(redis: Redis) -> None:
    sessions = SessionStore(redis, idle_s=60, longest_s=1, renewed_every_s=0)
    session = sessions.create("k", "s")
    begun = time.monotonic()
    while sessions.read(session) is not None:
        assert time.monotonic() - begun < 1.3
        time.sleep(0.05)
    assert time.monotonic() - begun > 0.9


def test_redis_drops_a_session_at_its_latest_end(redis: Redis) -> None:
    sessions = SessionStore(redis, idle_s=60, longest_s=10, renewed_every_s=0)
    session = sessions.create("k", "s")
    assert 5 < ttl_s(redis, session) <= 10
    assert sessions.read(session) is not None
    assert 5 < ttl_s(redis, session) <= 10


def test_the_latest_end_holds_though_redis_still_has_the_session(redis: Redis) -> None:
    sessions = SessionStore(redis, idle_s=60, longest_s=0.2)
    session = sessions.create("k", "s")
    assert session.digest is not None
    redis.persist(redis_keys.session(session.digest))
    time.sleep(0.3)
    assert sessions.read(session) is None


def test_few_uses_renew(redis: Redis, sessions: SessionStore) -> None:
    session = sessions.create("k", "s")
    assert session.digest is not None
    key = redis_keys.session(session.digest)
    redis.expire(key, redis_keys.SESSION_IDLE_S - 60)
    assert sessions.read(session) is not None
    assert ttl_s(redis, session) <= redis_keys.SESSION_IDLE_S - 60
    redis.expire(key, redis_keys.SESSION_IDLE_S - redis_keys.SESSION_RENEWED_EVERY_S - 1)
    assert sessions.read(session) is not None
    assert ttl_s(redis, session) > redis_keys.SESSION_IDLE_S - 5


def test_a_revoked_key_ends_its_sessions(gate: Gate, now: list[float], key_store: KeyStore) -> None:
    (_, hers), (_, his) = key_store.add("alice", Role.USER), key_store.add("bob", Role.USER)
    alice, bob = sign_in(gate, hers), sign_in(gate, his)
    assert not refused(gate, alice)
    key_store.revoke("alice")
    now[0] += KEY_CACHED_S
    assert refused(gate, alice)
    assert not refused(gate, bob)


def test_a_deleted_key_ends_its_sessions(
    gate: Gate, now: list[float], key_store: KeyStore, redis: Redis
) -> None:
    key, token = key_store.add("alice", Role.USER)
    session = sign_in(gate, token)
    redis.hdel(redis_keys.API_KEYS, key.id)
    now[0] += KEY_CACHED_S
    assert refused(gate, session)


def test_a_rotated_key_ends_the_sessions_of_its_old_secret(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.USER)
    old = sign_in(gate, token)
    assert not refused(gate, old)
    _, rotated = key_store.rotate("alice")
    assert not refused(gate, sign_in(gate, rotated))  # at once, though the old key is cached
    assert refused(gate, old)


def test_a_changed_role_counts_for_sessions(
    gate: Gate, now: list[float], key_store: KeyStore, redis: Redis
) -> None:
    key, token = key_store.add("alice", Role.USER)
    session = sign_in(gate, token)
    assert gate.admit(session).role is Role.USER
    for role in (Role.OPS, Role.USER):
        changed = key.model_copy(update={"role": role})
        redis.hset(redis_keys.API_KEYS, key.id, changed.model_dump_json())
        now[0] += KEY_CACHED_S
        assert gate.admit(session).role is role


def test_signing_out(gate: Gate, key_store: KeyStore, sessions: SessionStore, redis: Redis) -> None:
    key, token = key_store.add("alice", Role.USER)
    _, his = key_store.add("bob", Role.USER)
    first, second, third = (sign_in(gate, token) for _ in range(3))
    bob = sign_in(gate, his)
    for _ in range(2):
        sessions.end(first)
    assert [refused(gate, each) for each in (first, second, third, bob)] == [True] + [False] * 3
    assert digests(redis, key.id) == 2
    for _ in range(2):
        sessions.end_all(key.id)
    assert [refused(gate, each) for each in (second, third, bob)] == [True, True, False]
    assert digests(redis, key.id) == 0
    assert not refused(gate, sign_in(gate, token))


def test_a_key_has_so_many_sessions(redis: Redis, sessions: SessionStore) -> None:
    made = [sessions.create("k", "s") for _ in range(2)]
    time.sleep(0.01)  # they are ordered by the millisecond
    made += [sessions.create("k", "s") for _ in range(MOST_SESSIONS)]
    assert [sessions.read(each) is None for each in made] == [True] * 2 + [False] * MOST_SESSIONS
    assert digests(redis, "k") == MOST_SESSIONS


def test_ended_sessions_leave_the_index(redis: Redis) -> None:
    SessionStore(redis, longest_s=0.1).create("k", "s")
    SessionStore(redis).create("k", "s")
    time.sleep(0.2)
    SessionStore(redis).create("k", "s")
    assert digests(redis, "k") == 2


def test_an_unreadable_session_opens_nothing(
    redis: Redis, sessions: SessionStore, caplog: pytest.LogCaptureFixture
) -> None:
    session = sessions.create("k", "s")
    assert session.digest is not None
    redis.set(redis_keys.session(session.digest), '{"key_id": "a secret"}')
    assert sessions.read(session) is None
    sessions.end(session)
    assert not redis.exists(redis_keys.session(session.digest))
    assert "cannot be read" in caplog.text
    assert "a secret" not in caplog.text


def test_an_open_service_makes_no_session(redis: Redis, key_store: KeyStore) -> None:
    gate = Gate(key_store, RateLimiter(redis, "1/day"), SessionStore(redis), may_be_open=True)
    for token in (None, "unused", "unused"):
        assert gate.sign_in(token, "127.0.0.1") == (LOCAL, None)
    assert redis.keys("*") == []


def test_an_address_may_try_so_often(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.USER)
    for number in range(30):
        with pytest.raises(Unauthenticated):
            gate.sign_in(f"guess {number}", "192.0.2.7")
    with pytest.raises(TooManySignIns, match="this address") as limited:
        gate.sign_in(token, "192.0.2.7")
    wait_s = limited.value.context["retry_after_s"]
    assert isinstance(wait_s, int)
    assert 1 <= wait_s <= 60
    with pytest.raises(TooManySignIns):
        gate.sign_in(token, "::ffff:192.0.2.7")
    sign_in(gate, token, "192.0.2.8")


def test_an_ipv6_client_is_its_whole_network(gate: Gate) -> None:
    for number in range(30):
        with pytest.raises(Unauthenticated):
            gate.sign_in("guess", f"2001:db8::{number:x}")
    with pytest.raises(TooManySignIns):
        gate.sign_in("guess", "2001:db8::ffff:1")
    with pytest.raises(Unauthenticated):
        gate.sign_in("guess", "2001:db8:0:1::1")


def test_a_key_may_be_tried_so_often(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.USER)
    _, other = key_store.add("bob", Role.USER)
    guess = token[:-64] + "0" * 64
    for number in range(60):
        with pytest.raises(Unauthenticated):
            gate.sign_in(guess, f"192.0.2.{number % 20}")
    with pytest.raises(TooManySignIns, match="this key"):
        gate.sign_in(token, "192.0.2.99")
    sign_in(gate, other, "192.0.2.99")
    assert gate.admit(token).name == "alice"  # only signing in is limited


def test_requests_of_a_session_count_for_its_key(gate: Gate, key_store: KeyStore) -> None:
    _, token = key_store.add("alice", Role.USER, rate="3/minute")
    session = sign_in(gate, token)
    gate.admit(session)
    gate.admit(token)
    for credential in (session, token):
        with pytest.raises(RateLimited):
            gate.admit(credential)
