"""Test the service's log: every request with its id and duration, and without secrets."""

import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jobs.catalog import WorkerOffer
from service.middleware.request_log import REQUEST_ID
from tests.support.http_service import address_in, service

UNKNOWN = "01a2039b8ee84d074d36452736a1b6c7"


@pytest.fixture
def lines(redis_url: str, tmp_path: Path, live_worker: WorkerOffer) -> list[dict[str, Any]]:
    """The log of a service that handled the requests of `ask`, as JSON."""
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_PORT": "0",
        "LOG_FORMAT": "json",
    }
    with service(**environment) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if "listening on" in line)
        with httpx2.Client(base_url=address_in(first), trust_env=False) as client:
            ask(client)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
    return [json.loads(line) for line in (first + rest).splitlines()]


def ask(client: httpx2.Client) -> None:
    made = client.post("/generate", json={"prompt": "red"}, headers={REQUEST_ID: "mine-1"})
    assert made.headers[REQUEST_ID] == "mine-1"
    client.get(made.headers["location"], headers={REQUEST_ID: "mine-2"})
    client.get(f"/jobs/{UNKNOWN}/video.mp4?expires=1&signature=f00d")
    client.get("/jobs/%0Aforged%20line", headers={REQUEST_ID: "two words"})
    odd = client.get("/healthz", headers={REQUEST_ID: "x" * 65})
    assert re.fullmatch("[0-9a-f]{16}", odd.headers[REQUEST_ID])


def accesses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in lines if each["logger"] == "service.access"]


def test_every_request_has_one_line(lines: list[dict[str, Any]]) -> None:
    found = [(each["method"], each["path"], each["status"]) for each in accesses(lines)]
    made, read, *others = found
    assert made == ("POST", "/generate", 202)
    assert re.fullmatch(r"/jobs/[0-9a-f]{32}", read[1])
    assert others == [
        ("GET", f"/jobs/{UNKNOWN}/video.mp4", 403),
        ("GET", "/jobs/%0Aforged%20line", 404),
        ("GET", "/healthz", 200),
    ]
    for each in accesses(lines):
        assert 0 < each["duration_s"] < 20
        assert each["client"] == "127.0.0.1"
        assert each["level"] == "INFO"


def test_lines_carry_the_request_and_its_job(lines: list[dict[str, Any]]) -> None:
    made, read, refused, odd, health = accesses(lines)
    assert (made["request_id"], read["request_id"]) == ("mine-1", "mine-2")
    assert made["job_id"] == read["job_id"] == read["path"].rpartition("/")[2]
    assert refused["job_id"] == UNKNOWN
    for each in (odd, health):
        assert "job_id" not in each
        assert re.fullmatch("[0-9a-f]{16}", each["request_id"]), "not the caller's odd one"


def test_links_leave_no_signature(lines: list[dict[str, Any]]) -> None:
    assert "f00d" not in str(lines)
    assert "signature" not in str(lines)


def test_what_is_not_about_a_request_has_no_request(lines: list[dict[str, Any]]) -> None:
    listening = next(each for each in lines if each["message"].startswith("listening on"))
    assert set(listening) == {"time", "level", "logger", "message"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_forwarded_addresses_and_paths_cannot_forge_lines(
    redis_url: str, tmp_path: Path, log_format: str
) -> None:
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_PORT": "0",
        "LOG_FORMAT": log_format,
    }
    forged = b"\x1b[2J\x07\x7f\x85\x9b31m evil"
    with service(**environment) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if "listening on" in line)
        port = int(address_in(first).rpartition(":")[2])
        for target, address in (
            (b"/healthz", b"x" + forged),
            (b"/healthz", b"y" * 20_000),
            (b"/%0A%1b[2J%c2%85%e2%80%a8", b"203.0.113.9"),
            (b"/" + b"z" * 20_000, b"203.0.113.9"),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(
                    b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                    b"User-Agent: " + forged + b"\r\nX-Forwarded-For: " + address + b"\r\n\r\n"
                )
                assert client.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 404")
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
    found = [line for line in rest.splitlines() if "service.access" in line]
    assert len(found) == 4
    assert all(line.isprintable() for line in rest.splitlines())
    assert all(len(line) < 600 for line in found)
    assert "203.0.113.9" in found[-1]
