"""Test that a service which had keys, or has a public URL, does not open by itself."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from jobs import redis_keys
from service.app import create_app
from service.auth.api_keys import KeyStore, Role
from service.auth.gate import LOCAL
from service.auth.key_memory import KeyMemory, KeyPolicy
from service.settings import ServiceSettings
from tests.support.http_service import address, service


@pytest.fixture
def by_itself(settings: ServiceSettings, tmp_path: Path) -> ServiceSettings:
    """The settings of a service that nobody configured."""
    state = {"keys": KeyPolicy.AUTO, "state_dir": tmp_path / "state"}
    return settings.model_copy(update={"public_url": None, **state})


@contextmanager
def process(settings: ServiceSettings, **changes: object) -> Iterator[TestClient]:
    """What a process that starts now answers."""
    app = create_app(settings.model_copy(update=changes))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def is_open(settings: ServiceSettings, **changes: object) -> bool:
    with process(settings, **changes) as client:
        return client.get("/jobs").status_code == 200


def lose_keys(redis: Redis, how: str) -> None:
    if how == "flush":
        redis.flushall()
    else:
        redis.delete(redis_keys.API_KEYS, redis_keys.API_KEYS_USED)


@pytest.mark.parametrize("how", ["flush", "only the keys"])
def test_keys_that_vanish_do_not_open_a_process_that_starts_later(
    by_itself: ServiceSettings, key_store: KeyStore, redis: Redis, how: str
) -> None:
    assert is_open(by_itself)
    key_store.add("alice", Role.USER)
    assert not is_open(by_itself)
    lose_keys(redis, how)
    assert not is_open(by_itself)


def test_nor_does_another_database(by_itself: ServiceSettings, key_store: KeyStore) -> None:
    key_store.add("alice", Role.USER)
    assert not is_open(by_itself)
    other = by_itself.redis_url.get_secret_value().removesuffix("/0") + "/9"
    assert not is_open(by_itself, redis_url=SecretStr(other))


def test_a_key_that_was_only_used_is_remembered(
    by_itself: ServiceSettings, key_store: KeyStore, redis: Redis
) -> None:
    """A process with a public URL never asks whether it may be open."""
    _, token = key_store.add("alice", Role.USER)
    with process(by_itself, public_url="http://video.example") as client:
        bearer = {"Authorization": f"Bearer {token}", "Host": "video.example"}
        assert client.get("/jobs", headers=bearer).status_code == 200
    redis.flushall()
    assert not is_open(by_itself)


def test_a_process_that_runs_closes_when_another_notes_keys(
    by_itself: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(by_itself)
    gate = app.state.app_state.gate
    now = 1000.0
    monkeypatch.setattr(gate, "_clock", lambda: now)
    assert gate.admit(None) is LOCAL
    assert by_itself.key_memory is not None
    by_itself.key_memory.note()
    now += 10
    assert not gate.is_open
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/jobs").status_code == 401


def test_services_with_other_artifacts_do_not_share_a_memory(
    by_itself: ServiceSettings, key_store: KeyStore, redis: Redis, tmp_path: Path
) -> None:
    key_store.add("alice", Role.USER)
    assert not is_open(by_itself)
    redis.flushall()
    assert is_open(by_itself, artifacts_url=(tmp_path / "others").as_uri())


@pytest.mark.parametrize(
    ("public_url", "opens"),
    [
        (None, True),
        ("http://localhost:8000", True),
        ("http://127.0.0.1/video", True),
        ("https://video.example", False),
        ("http://192.168.0.7", False),
    ],
)
def test_a_public_url_closes_it(
    by_itself: ServiceSettings, public_url: str | None, opens: bool
) -> None:
    assert is_open(by_itself, public_url=public_url) is opens


def test_required_closes_it_and_open_opens_it_until_a_key_is_made(
    by_itself: ServiceSettings, key_store: KeyStore, redis: Redis
) -> None:
    assert not is_open(by_itself, keys=KeyPolicy.REQUIRED)
    key_store.add("alice", Role.USER)
    assert not is_open(by_itself)
    assert not is_open(by_itself, keys=KeyPolicy.OPEN)
    redis.flushall()
    assert is_open(by_itself, keys=KeyPolicy.OPEN, public_url="https://video.example")
    assert not is_open(by_itself)


def test_a_memory_that_cannot_be_written_is_said_once_and_refuses_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    memory = KeyMemory(tmp_path / "state" / "wan", "file:///a")
    with caplog.at_level(logging.WARNING):
        memory.note()
        memory.note()
    (said,) = caplog.messages
    assert "SERVICE_STATE_DIR" in said
    assert not memory.had_keys()


def test_by_default_it_is_kept_in_the_home_of_the_user(
    by_itself: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = by_itself.model_copy(update={"state_dir": None, "xdg_state_home": None})
    monkeypatch.setenv("HOME", "/home/carol")
    memory = bare.key_memory
    assert memory is not None
    assert memory.path.parent == Path("/home/carol/.local/state/wan-hif8")


@pytest.mark.parametrize(
    ("case", "environment", "sentence"),
    [
        ("nothing", {}, "The service is open: everybody"),
        ("a key", {}, "Callers need an API key."),
        ("a key", {"SERVICE_KEYS": "open"}, "Callers need an API key."),
        ("a revoked key", {}, "there is none that could be used; make one with"),
        ("keys that vanished", {}, "Redis holds none, though this service had keys"),
        ("keys that vanished", {"SERVICE_KEYS": "open"}, "The service is open: everybody"),
        ("nothing", {"SERVICE_KEYS": "required"}, "there is none that could be used"),
        ("nothing", {"SERVICE_PUBLIC_URL": "https://video.example"}, "none that could be used"),
        ("no Redis", {}, "not known before Redis answers"),
    ],
)
def test_the_start_says_who_may_use_it(
    redis_url: str,
    tmp_path: Path,
    redis: Redis,
    case: str,
    environment: dict[str, str],
    sentence: str,
) -> None:
    key_store = KeyStore(redis)
    if "key" in case:
        key_store.add("alice", Role.USER)
    if case == "a revoked key":
        key_store.revoke("alice")
    settings = {
        **{"REDIS_URL": redis_url, "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri()},
        **{"SERVICE_PORT": "0", "SERVICE_STATE_DIR": str(tmp_path / "state"), **environment},
    }
    if case == "keys that vanished":
        with service(**{**settings, "SERVICE_KEYS": "auto"}) as earlier:
            assert earlier.stderr is not None
            assert any("Callers need" in line for line in earlier.stderr)
        redis.flushall()
    if case == "no Redis":
        settings["REDIS_URL"] = "redis://127.0.0.1:1/0"  # nobody listens there
    with service(**settings) as running:
        url = address(running)
        assert running.stderr is not None
        said = next(line for line in running.stderr if re.search("[Cc]allers|is open", line))
        if case != "no Redis":
            status = httpx2.get(f"{url}/jobs", trust_env=False).status_code
            assert status == (200 if "is open" in said else 401)
    assert sentence in said


def test_open_is_refused_where_others_reach_it(tmp_path: Path) -> None:
    with service(
        ARTIFACTS_URL=(tmp_path / "a").as_uri(), SERVICE_HOST="0.0.0.0", SERVICE_KEYS="open"
    ) as running:
        _, log = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "SERVICE_KEYS: it is open, and SERVICE_HOST is 0.0.0.0" in log
    assert log.count("\n") == 1
