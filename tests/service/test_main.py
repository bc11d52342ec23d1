"""`python -m service` as a process: it serves, keeps prompts out of its log, and stops."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from jobs.catalog import WorkerOffer


@contextmanager
def service(**environment: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: "subprocess.Popen[str]") -> str:
    """Read the log up to the line that says where the service listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            return found.group(1)
    raise AssertionError("the service ended without listening")


@pytest.fixture
def artifacts_url(tmp_path: Path) -> str:
    return (tmp_path / "artifacts").as_uri()


def test_serves_and_stops_quietly(
    redis_url: str, artifacts_url: str, live_worker: WorkerOffer
) -> None:
    environment = {"REDIS_URL": redis_url, "ARTIFACTS_URL": artifacts_url, "SERVICE_PORT": "0"}
    # trust_env: a proxy of the machine must not get in between.
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
        ({"SERVICE_HOST": "0.0.0.0"}, "SERVICE_HOST: 0.0.0.0 is reachable from outside"),
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
