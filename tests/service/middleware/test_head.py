"""Test that HEAD is answered wherever GET is, with the same status and headers and no body."""

import httpx2
import pytest
from fastapi.testclient import TestClient

from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey
from tests.support.http_service import serving

VARYING = ("x-request-id", "content-length", "date", "ratelimit")


def told(answer: httpx2.Response) -> tuple[int, dict[str, str]]:
    headers = {name: text for name, text in answer.headers.items() if name not in VARYING}
    return answer.status_code, headers


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(
    "path",
    [
        *("/jobs", "/jobs/ID", "/jobs/none", "/jobs?limit=0", "/models", "/session", "/workers"),
        *("/v1/videos", "/v1/videos/ID", "/v1/models", "/v1/models/wan-mini:bf16"),
        *("/healthz", "/readyz", "/openapi.json", "/docs", "/jobs/ID/video.mp4"),
        *("/jobs/ID/thumbnail.webp", "/v1/videos/ID/content", "/none", "/favicon.ico"),
    ],
)
def test_head_says_what_get_says(client: TestClient, make_job: MakeJob, path: str) -> None:
    path = path.replace("ID", make_job(video=True).id)
    head, get = client.head(path), client.get(path)
    assert told(head) == told(get)
    assert head.content == b""
    if "content-length" in get.headers:
        lengths = [int(answer.headers["content-length"]) for answer in (head, get)]
        # How long ago a worker was heard of has a digit more or fewer a moment later.
        assert abs(lengths[0] - lengths[1]) <= (4 if path == "/workers" else 0)


def test_head_of_what_has_no_get_is_refused(client: TestClient) -> None:
    answer = client.head("/generate")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_head_needs_the_same_key(client: TestClient, make_key: MakeKey, make_job: MakeJob) -> None:
    key, other = make_key("a"), make_key("b")
    path = f"/jobs/{make_job('a').id}"
    assert client.head(path).status_code == 401
    assert client.head(path, headers=other).status_code == 404
    assert client.head(path, headers=key).status_code == 200


def test_head_of_a_stream_ends(settings: ServiceSettings, make_job: MakeJob) -> None:
    """Over a real connection, which can be used again: nothing of the stream follows."""
    with serving(settings) as site, httpx2.Client(timeout=20) as http:
        for _ in range(2):
            answer = http.head(f"{site.url}/jobs/{make_job().id}/events")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
        assert http.get(f"{site.url}/healthz").json() == {"status": "ok"}
