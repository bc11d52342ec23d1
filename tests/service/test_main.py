"""Test `python -m service` as a process: it serves, logs no prompts, and stops."""

import signal
import socket
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from jobs.catalog import WorkerOffer
from service.auth.api_keys import KeyStore, Role
from tests.support.http_service import address, service


@pytest.fixture
def artifacts_url(tmp_path: Path) -> str:
    return (tmp_path / "artifacts").as_uri()


def test_serves_and_stops_quietly(
    redis_url: str, artifacts_url: str, live_worker: WorkerOffer
) -> None:
    environment = {"REDIS_URL": redis_url, "ARTIFACTS_URL": artifacts_url, "SERVICE_PORT": "0"}
    # trust_env: requests must not go through a proxy of the machine.
    with (
        service(**environment) as process,
        httpx2.Client(base_url=address(process), trust_env=False) as client,
    ):
        answer = client.post("/generate", json={"prompt": "a very private prompt"})
        assert answer.status_code == 202
        refused = client.post("/generate", json={"prompt": "another private one", "seed": -1})
        assert refused.status_code == 422
        assert client.get(answer.headers["location"]).json() == answer.json()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "POST /generate" in log
    assert "private" not in log
    assert "Traceback" not in log


def test_an_open_request_does_not_keep_it_from_ending(redis_url: str, artifacts_url: str) -> None:
    with service(REDIS_URL=redis_url, ARTIFACTS_URL=artifacts_url, SERVICE_PORT="0") as process:
        port = int(address(process).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            # 100-continue: the answer says that the request has reached the application.
            client.sendall(
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            )
            assert client.recv(100).startswith(b"HTTP/1.1 100")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ARTIFACTS_URL": "ftp://host/x"}, "file:///absolute/folder"),
        ({"ARTIFACTS_URL": "s3://b?x=1"}, "ARTIFACTS_URL"),
        ({"ARTIFACTS_URL": "file:///proc/none/here"}, "/proc/none"),
        ({"SERVICE_PORT": "many"}, "SERVICE_PORT: "),
        ({"REDIS_URL": "http://:secret@x"}, "REDIS_URL: it does not start with redis://"),
    ],
)
def test_bad_settings_end_it_with_one_line(
    artifacts_url: str, environment: dict[str, str], sentence: str
) -> None:
    with service(**{"ARTIFACTS_URL": artifacts_url, **environment}) as process:
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert sentence in log
    assert log.count("\n") == 1
    assert "secret" not in log


def test_port_in_use_ends_it_with_one_line(artifacts_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with service(ARTIFACTS_URL=artifacts_url, SERVICE_PORT=port) as process:
            _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"port {port}: Address already in use" in log
    assert log.count("\n") == 1


def test_the_access_log_holds_paths_and_no_secrets(
    redis_url: str, artifacts_url: str, live_worker: WorkerOffer, key_store: KeyStore
) -> None:
    _, token = key_store.add("alice", Role.USER)
    environment = {"REDIS_URL": redis_url, "ARTIFACTS_URL": artifacts_url, "SERVICE_PORT": "0"}
    bearer = {"Authorization": f"Bearer {token}"}
    with (
        service(**environment) as process,
        httpx2.Client(base_url=address(process), trust_env=False) as client,
    ):
        # Prompts that are valid, refused, unreadable, and sent in other parts of a request.
        private = {"prompt": "a very private prompt"}
        sent = client.post("/generate", json=private, headers=bearer)
        assert sent.status_code == 202
        statuses = [
            client.post("/generate", json=private).status_code,
            client.post("/generate", json={**private, "seed": -1}, headers=bearer).status_code,
            client.post("/generate", content=b'{"prompt": "private', headers=bearer).status_code,
            client.get("/jobs?state=private", headers=bearer).status_code,
            client.get(
                sent.headers["location"] + "/video.mp4?expires=1&signature=f00d"
            ).status_code,
        ]
        assert statuses == [401, 422, 415, 422, 403]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    for line in (
        "POST /generate 202",
        "POST /generate 422",
        "GET /jobs 422",
        f"GET {sent.headers['location']}/video.mp4 403",
    ):
        assert line in log
    for secret in ("private", "signature", "f00d", token, token.split("_")[2], "?"):
        assert secret not in log


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_loopback_it_wants_a_key_first(
    redis_url: str, artifacts_url: str, key_store: KeyStore, host: str
) -> None:
    environment = {
        **{"REDIS_URL": redis_url, "ARTIFACTS_URL": artifacts_url},
        **{"SERVICE_HOST": host, "SERVICE_PORT": "0"},
    }
    # A revoked key cannot be used, so it does not count.
    key_store.add("gone", Role.OPS)
    key_store.revoke("gone")
    with service(**environment) as process:
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"SERVICE_HOST: {host} is reachable from outside" in log
    assert "`python -m service keys add NAME --role ops`" in log
    assert log.count("\n") == 1

    _, token = key_store.add("alice", Role.USER)
    with service(**environment) as process:
        port = address(process).rpartition(":")[2]
        loopback = "[::1]" if ":" in host else "127.0.0.1"
        with httpx2.Client(base_url=f"http://{loopback}:{port}", trust_env=False) as client:
            assert client.get("/jobs").status_code == 401
            bearer = {"Authorization": f"Bearer {token}"}
            assert client.get("/jobs", headers=bearer).status_code == 200


def test_beyond_loopback_it_does_not_start_without_redis(
    artifacts_url: str, unused_port: int
) -> None:
    redis_url = f"redis://:hidden@127.0.0.1:{unused_port}/0"
    with service(
        REDIS_URL=redis_url, ARTIFACTS_URL=artifacts_url, SERVICE_HOST="0.0.0.0", SERVICE_PORT="0"
    ) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Redis, which holds them, cannot be asked" in log
    assert "hidden" not in log
    assert log.count("\n") == 1


def test_odd_headers_over_a_real_connection(redis_url: str, artifacts_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        KeyStore(redis).add("alice", Role.USER)
    with service(REDIS_URL=redis_url, ARTIFACTS_URL=artifacts_url, SERVICE_PORT="0") as process:
        port = int(address(process).rpartition(":")[2])

        def status_of(authorization: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(
                    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                    b"Authorization: " + authorization + b"\r\n\r\n"
                )
                return client.recv(12)

        # uvicorn itself refuses NUL bytes and a header of 100 kB with 400, which is not a 500.
        for odd, expected in (
            (b"Bearer \xff\xfe", b"401"),
            ("Bearer wan_💥".encode(), b"401"),
            (b"Bearer " + b"a" * 30_000, b"401"),
            (b"Bearer \x00", b"400"),
        ):
            assert status_of(odd) == b"HTTP/1.1 " + expected
        assert status_of(b"Bearer " + b"a" * 100_000)[:10] in (b"HTTP/1.1 4",)
