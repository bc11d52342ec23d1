"""Test API keys: made, checked, listed and revoked, by code and on the command line."""

import os
import re
import subprocess
import sys
import threading

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.errors import InvalidSpec, KeyConflict, KeyNotFound
from service.auth.api_keys import KeyStore, Role, proves, split


def test_a_key_is_shown_once_and_kept_as_a_hash(key_store: KeyStore, redis: Redis) -> None:
    made, token = key_store.add("alice", Role.USER, quota=3, rate="5/second")
    assert re.fullmatch(r"wan_[0-9a-f]{12}_[0-9a-f]{64}", token)
    parts = split(token)
    assert parts is not None
    assert parts[0] == made.id
    stored = redis.hgetall(redis_keys.API_KEYS)
    assert list(stored) == [made.id.encode()]
    assert parts[1] not in str(stored)
    found = key_store.get(made.id)
    assert found == made
    assert (found.name, found.role, found.quota, found.rate) == ("alice", "user", 3, "5/second")
    assert redis.ttl(redis_keys.API_KEYS) == -1


def test_only_the_secret_proves_a_key(key_store: KeyStore) -> None:
    made, token = key_store.add("alice", Role.USER)
    _, other = key_store.add("bob", Role.USER)
    secret, wrong = token.rpartition("_")[2], other.rpartition("_")[2]
    assert proves(secret, made)
    assert not proves(wrong, made)
    assert not proves(secret, None)
    # The secret that stands in for a missing key does not authenticate anybody.
    assert not proves("0" * 64, None)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "wan_",
        "sk-1234",
        "wan_0123456789ab_" + "0" * 63,
        "wan_0123456789ab_" + "0" * 65,
        "wan_0123456789AB_" + "0" * 64,
        "wan_0123456789ab_" + "0" * 64 + "\n",
        "wan_0123456789ab_" + "٠" * 64,
        "WAN_0123456789ab_" + "0" * 64,
    ],
)
def test_what_cannot_be_a_key(token: str) -> None:
    assert split(token) is None


@pytest.mark.parametrize(
    ("name", "limits", "reason"),
    [
        ("", {}, "1 to 64 letters"),
        ("a b", {}, "1 to 64 letters"),
        ("a:b", {}, "1 to 64 letters"),
        ("é", {}, "1 to 64 letters"),
        ("-a", {}, "1 to 64 letters"),
        ("a\n", {}, "1 to 64 letters"),
        ("a" * 65, {}, "1 to 64 letters"),
        ("0123456789ab", {}, "mistaken"),
        ("local", {}, "mistaken"),
        ("alice", {"quota": 0}, "quota is 0"),
        ("alice", {"rate": "often"}, "^'often' is not a rate; write it like"),
        ("alice", {"rate": "0/minute"}, "^'0/minute' is not a rate; write it like"),
    ],
)
def test_refused_keys_are_not_written(
    key_store: KeyStore, name: str, limits: dict[str, int], reason: str
) -> None:
    with pytest.raises(InvalidSpec, match=reason):
        key_store.add(name, Role.USER, **limits)  # type: ignore[arg-type]
    assert not key_store.any_was_made()


def test_a_name_is_given_once_even_after_it_was_revoked(key_store: KeyStore) -> None:
    made, _ = key_store.add("alice", Role.USER)
    with pytest.raises(KeyConflict, match="already a key named alice"):
        key_store.add("alice", Role.OPS)
    key_store.revoke("alice")
    with pytest.raises(KeyConflict, match="already a key named alice"):
        key_store.add("alice", Role.USER)
    assert [each.id for each in key_store.all()] == [made.id]


def test_a_name_is_given_once_when_many_ask_at_the_same_time(redis_url: str) -> None:
    made: list[str] = []
    refused: list[str] = []

    def ask() -> None:
        with Redis.from_url(redis_url) as redis:
            try:
                made.append(KeyStore(redis).add("alice", Role.USER)[0].id)
            except KeyConflict as error:
                refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)


@pytest.mark.parametrize("by", ["name", "id"])
def test_revoked_keys_stay_listed(key_store: KeyStore, by: str) -> None:
    made, _ = key_store.add("alice", Role.USER)
    other, _ = key_store.add("bob", Role.OPS)
    revoked = key_store.revoke(getattr(made, by))
    assert revoked.revoked_at is not None
    assert key_store.revoke(getattr(made, by)) == revoked
    assert key_store.all() == [revoked, other]


def test_nobodys_key_cannot_be_changed(key_store: KeyStore) -> None:
    for change in (key_store.revoke, key_store.rotate):
        with pytest.raises(KeyNotFound, match="no key with the name or id 'alice'"):
            change("alice")


def test_a_rotated_key_has_another_secret_and_is_the_same_otherwise(key_store: KeyStore) -> None:
    made, old = key_store.add("alice", Role.OPS, quota=2)
    rotated, new = key_store.rotate("alice")
    assert key_store.all() == [rotated]
    assert rotated == made.model_copy(update={"secret_sha256": rotated.secret_sha256})
    assert proves(new.rpartition("_")[2], rotated)
    assert not proves(old.rpartition("_")[2], rotated)
    key_store.revoke("alice")
    with pytest.raises(KeyConflict, match="for good"):
        key_store.rotate("alice")


def test_an_unreadable_key_opens_nothing_and_hides_no_other(
    key_store: KeyStore, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = key_store.add("alice", Role.USER)
    redis.hset(redis_keys.API_KEYS, "0123456789ab", '{"name": "a secret"}')
    assert key_store.get("0123456789ab") is None
    assert key_store.all() == [made]
    assert "0123456789ab" in caplog.text
    assert "a secret" not in caplog.text


def command(redis_url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service", "keys", *arguments],
        env={**os.environ, "REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_line_makes_lists_and_revokes(redis_url: str, key_store: KeyStore) -> None:
    made = command(redis_url, "add", "alice", "--role", "ops", "--quota", "7", "--rate", "9/day")
    assert made.returncode == 0, made.stderr
    # Alone on stdout, so that `KEY=$(...)` is the key.
    parts = split(made.stdout.removesuffix("\n"))
    assert parts is not None
    key = key_store.get(parts[0])
    assert proves(parts[1], key)
    assert parts[1] not in made.stderr

    listed = command(redis_url, "list").stdout.splitlines()
    assert len(listed) == 2
    for text in ("alice", parts[0], "ops", "never", "7", "9/day", "usable"):
        assert text in listed[1]
    assert parts[1] not in "".join(listed)

    rotated = split(command(redis_url, "rotate", "alice").stdout.removesuffix("\n"))
    assert rotated is not None
    assert rotated[0] == parts[0]
    assert proves(rotated[1], key_store.get(parts[0]))
    assert command(redis_url, "revoke", "alice").returncode == 0
    assert "revoked 20" in command(redis_url, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["add", "a b"], "service: name is a b, which is not 1 to 64 letters"),
        (["revoke", "nobody"], "service: There is no key with the name or id 'nobody'."),
    ],
)
def test_the_command_line_refuses_with_one_line(
    redis_url: str, arguments: list[str], sentence: str
) -> None:
    done = command(redis_url, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1


def test_the_command_line_without_redis_says_so(unused_port: int) -> None:
    done = command(f"redis://:hidden@127.0.0.1:{unused_port}/0", "list")
    assert done.returncode == 1
    assert done.stderr.startswith("service: Redis at REDIS_URL cannot be reached")
    assert "hidden" not in done.stderr
    assert done.stderr.count("\n") == 1
    wrong = command("http://localhost", "list")
    assert wrong.stderr.startswith("service: REDIS_URL: it does not start with redis://")
