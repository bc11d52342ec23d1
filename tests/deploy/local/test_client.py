"""Test the local client with a real service that requires API keys."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from redis import Redis

from deploy.local import client
from deploy.local.errors import LocalError, Refused
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from service.auth.api_keys import KeyStore, Role
from service.settings import ServiceSettings
from tests.support.http_service import address, service

REQUEST = client.VideoRequest("a small red circle")


def test_it_sends_the_key_from_the_environment(
    settings: ServiceSettings,
    redis: Redis,
    store: JobStore,
    live_worker: WorkerOffer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, token = KeyStore(redis).add("alice", Role.USER)
    environment = {
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "ARTIFACTS_URL": settings.artifacts_url,
        "SERVICE_PORT": "0",
    }
    with service(**environment) as process:
        url = address(process)
        monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
        with client.connect(url) as anonymous, pytest.raises(Refused, match="needs an API key"):
            client.send(anonymous, REQUEST)
        monkeypatch.setenv(client.KEY_VARIABLE, token)
        with client.connect(url) as alice:
            job = client.send(alice, REQUEST)
    assert store.get(job["id"]).owner == "alice"


def test_it_fetches_a_video_without_showing_the_key_to_the_host_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"the video"
    seen: list[str | None] = []

    class OtherHost(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv(client.KEY_VARIABLE, "wan_key")
    with HTTPServer(("127.0.0.1", 0), OtherHost) as other_host:
        threading.Thread(target=other_host.handle_request).start()
        url = f"http://127.0.0.1:{other_host.server_port}/video.mp4"
        job = {"id": "a", "video": {"url": url, "sha256": hashlib.sha256(data).hexdigest()}}
        with client.connect("http://127.0.0.1:1") as caller:
            client.save(caller, job, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == data
    assert seen == [None]


def test_a_video_that_arrives_damaged_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"an earlier video")
    job = {
        "id": "a",
        "video": {"url": "http://host/video.mp4", "sha256": hashlib.sha256(b"whole").hexdigest()},
    }
    damaged = httpx.MockTransport(lambda _: httpx.Response(200, content=b"wh0le"))
    with httpx.Client(transport=damaged) as caller, pytest.raises(LocalError, match="damaged"):
        client.save(caller, job, out)
    assert out.read_bytes() == b"an earlier video"
    assert list(tmp_path.iterdir()) == [out]
