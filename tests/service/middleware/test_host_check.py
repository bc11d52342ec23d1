"""Test the checks of Host and Origin, the body limit, and the headers of every answer."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from service.app import MAX_BODY_BYTES, create_app
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey

ASK = {"prompt": "a small red circle"}


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1", "127.0.0.1:1", "[::1]:8000"),
        *("testserver", "TestServer:443"),
    ],
)
def test_the_names_a_service_on_loopback_is_known_by(client: TestClient, host: str) -> None:
    assert client.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("localhost@evil.example", "", "[::1", "10.0.0.1", "0.0.0.0", "2130706433", "local\x00"),
    ],
)
@pytest.mark.parametrize("path", ["/jobs", "/healthz", "/docs"])
def test_a_foreign_name_is_turned_away_on_loopback(
    client: TestClient, host: str, path: str
) -> None:
    answer = client.get(path, headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (421, "misdirected_request")
    assert "SERVICE_PUBLIC_URL" in answer.json()["detail"]


def test_beyond_loopback_a_service_has_any_name(
    settings: ServiceSettings, make_key: MakeKey
) -> None:
    exposed = settings.model_copy(update={"host": "0.0.0.0", "public_url": None})
    headers = make_key("alice") | {"Host": "video.example"}
    with TestClient(create_app(exposed)) as client:
        assert client.get("/jobs", headers=headers).status_code == 200


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "https://evil.example:8000", "null", "", "http://"),
        *("http://testserver.evil.example", "http://testserver:81", "http://evil@testserver"),
        *("http://[", "file://", "http://localhost"),
    ],
)
def test_another_sites_page_changes_nothing(
    client: TestClient, make_job: MakeJob, store: JobStore, origin: str
) -> None:
    job = make_job()
    headers = {"Origin": origin}
    for method, path in (("POST", "/generate"), ("DELETE", f"/jobs/{job.id}")):
        body = ASK if method == "POST" else None
        answer = client.request(method, path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert [each.id for each in store.list().jobs] == [job.id]
    assert store.get(job.id).state == "queued"
    # Without CORS headers its page cannot read what this sends.
    read = client.get("/jobs", headers=headers)
    assert read.status_code == 200
    assert not [name for name in read.headers if name.startswith("access-control")]


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("testserver", "http://testserver"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "https://testserver"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_the_services_own_pages_may(client: TestClient, host: str, origin: str) -> None:
    headers = {"Host": host, "Origin": origin}
    assert client.post("/generate", json=ASK, headers=headers).status_code == 202


def test_every_answer_carries_the_headers(
    client: TestClient, settings: ServiceSettings, make_job: MakeJob, unused_port: int
) -> None:
    job = make_job(video=True)
    app = create_app(settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError

    with TestClient(app, raise_server_exceptions=False) as failing:
        answers = {
            "200": client.get("/jobs"),
            "video": client.get(f"/jobs/{job.id}/video.mp4"),
            "404": client.get("/nowhere"),
            "405": client.put("/jobs"),
            "413": client.post("/generate", content=b"x" * (MAX_BODY_BYTES + 1)),
            "421": client.get("/jobs", headers={"Host": "evil.example"}),
            "403": client.post("/generate", headers={"Origin": "null"}),
            "500": failing.get("/broken"),
            "docs": client.get("/docs"),
        }
    assert [answers[name].status_code for name in ("413", "500")] == [413, 500]
    for name, answer in answers.items():
        headers = answer.headers
        assert headers["x-content-type-options"] == "nosniff", name
        assert headers["x-frame-options"] == "DENY", name
        assert headers["referrer-policy"] == "no-referrer", name
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; "), name
        assert "frame-ancestors 'none'" in policy, name
        assert ("script-src" in policy) is (name == "docs"), name
        if headers["content-type"].endswith("json"):
            assert headers["cache-control"] == "no-store", name
    assert "no-store" not in answers["video"].headers["cache-control"]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 10 * 1024 * 1024])
def test_large_bodies_are_refused(
    client: TestClient, live_worker: WorkerOffer, announced: bool, size: int
) -> None:
    pieces = (b" " * 65536 for _ in range(size // 65536 + 1))
    body = b" " * size if announced else pieces
    headers = {"Content-Type": "application/json"}
    answer = client.post("/generate", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("announced", [True, False])
def test_large_forms_are_refused_the_same_way(client: TestClient, announced: bool) -> None:
    head = b'--cut\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    body = head + b"x" * (10 * 1024 * 1024) + b"\r\n--cut--\r\n"
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    answer = client.post(
        "/v1/videos",
        content=body if announced else pieces,
        headers={"Content-Type": "multipart/form-data; boundary=cut"},
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_refusals_under_v1_are_in_openais_shape(client: TestClient, make_key: MakeKey) -> None:
    make_key("alice")
    refused = client.get("/v1/videos", headers={"Authorization": "Bearer sk-1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthenticated")
    assert refused.headers["www-authenticate"] == "Bearer"
    limited = make_key("bob", rate="1/minute")
    assert client.get("/v1/videos", headers=limited).status_code == 200
    answer = client.get("/v1/videos", headers=limited)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["ratelimit-policy"] == '"key";q=1;w=60'
    foreign = client.post("/v1/videos", headers={"Origin": "http://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "forbidden")
    named = client.get("/v1/videos", headers={"Host": "evil.example"})
    assert (named.status_code, named.json()["error"]["code"]) == (421, "misdirected_request")


def test_redis_away_is_the_same_503_with_keys(settings: ServiceSettings, unused_port: int) -> None:
    away = settings.model_copy(
        update={
            "host": "0.0.0.0",
            "redis_url": SecretStr(f"redis://127.0.0.1:{unused_port}/0"),
        }
    )
    token = "wan_0123456789ab_" + "0" * 64
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        answer = client.get("/jobs", headers={"Authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        link = client.get("/jobs/a/video.mp4?expires=1&signature=0")
        assert (link.status_code, link.json()["code"]) == (503, "store_unavailable")
        # A request without a key is refused without reading Redis.
        assert client.get("/jobs").status_code == 401
