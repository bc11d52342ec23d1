"""Test what pages of other sites may do: forged requests with a cookie, and allowed origins."""

import itertools
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey, SignIn

ASK = {"prompt": "a small red circle"}
OWN, FOREIGN, ALLOWED = "http://testserver", "http://evil.example", "https://app.example"
SITES = (
    None,
    "same-origin",
    "none",
    "same-site",
    "cross-site",
    "",
    "Same-Origin",
    "same-origin, none",
)
ORIGINS = (None, OWN, FOREIGN, ALLOWED, "null", "http://testserver.evil.example")
CORS = "access-control-allow-origin"


def sent(site: str | None, origin: str | None) -> dict[str, str]:
    headers = {"Sec-Fetch-Site": site, "Origin": origin}
    return {name: value for name, value in headers.items() if value is not None}


@pytest.fixture
def cookie(make_key: MakeKey, sign_in: SignIn) -> dict[str, str]:
    return {"Cookie": sign_in(make_key("alice"))["Cookie"]}


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(("site", "origin"), list(itertools.product(SITES, ORIGINS)))
def test_a_cookie_needs_the_services_own_page(
    client: TestClient,
    cookie: dict[str, str],
    make_job: MakeJob,
    store: JobStore,
    site: str | None,
    origin: str | None,
) -> None:
    job = make_job("alice")
    headers = cookie | sent(site, origin)
    if site is None:
        may = origin == OWN
    else:
        may = site in ("same-origin", "none") and origin in (None, OWN)
    asked = client.post("/generate", json=ASK, headers=headers)
    cancelled = client.delete(f"/jobs/{job.id}", headers=headers)
    everywhere = client.delete("/session?all=true", headers=headers)
    answers = (asked, cancelled, everywhere)
    assert [each.status_code for each in answers] == ([202, 200, 204] if may else [403] * 3)
    if may:
        return
    for answer in answers:
        assert answer.json()["code"] == "forbidden"
        assert answer.headers["content-type"] == "application/problem+json"
    assert [each.id for each in store.list().jobs] == [job.id]
    assert store.get(job.id).state == "queued"
    assert client.get("/session", headers=cookie).status_code == 200
    # Reading changes nothing, and other sites' pages cannot read the answer.
    for method in ("GET", "HEAD"):
        read = client.request(method, f"/jobs/{job.id}/video.mp4", headers=headers)
        assert read.status_code == 404
    assert client.get("/jobs", headers=headers).status_code == 200


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("with_cookie", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_a_key_needs_no_page(
    client: TestClient,
    cookie: dict[str, str],
    make_key: MakeKey,
    site: str | None,
    with_cookie: bool,
) -> None:
    headers = make_key("bob") | (cookie if with_cookie else {})
    for origin, status in ((None, 202), (OWN, 202), (FOREIGN, 403), (ALLOWED, 403)):
        answer = client.post("/generate", json=ASK, headers=headers | sent(site, origin))
        assert answer.status_code == status, origin


@pytest.mark.parametrize(
    ("public_url", "host", "origin", "may"),
    [
        ("https://video.example", "video.example", "https://video.example", True),
        ("https://video.example:443/api", "backend:8000", "https://video.example", True),
        ("https://video.example", "video.example", "http://video.example", False),
        ("https://video.example", "video.example:80", "http://video.example:80", False),
        ("https://video.example", "other.example", "http://other.example", False),
        ("https://video.example", "127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("https://video.example", "127.0.0.1:8000", "https://video.example", True),
        ("https://video.example", "127.0.0.1:8000", "http://video.example", False),
        ("https://video.example", "localhost:8000", "http://127.0.0.1:8000", False),
        (None, "video.example:8000", "http://video.example:8000", True),
        (None, "video.example:8000", "http://video.example", False),
        (None, "video.example", "null", False),
        (None, "", "null", False),
    ],
)
def test_the_services_own_origin(
    settings: ServiceSettings,
    cookie: dict[str, str],
    public_url: str | None,
    host: str,
    origin: str,
    may: bool,
) -> None:
    """Without Sec-Fetch-Site, which browsers do not send to names without TLS."""
    exposed = settings.model_copy(update={"host": "0.0.0.0", "public_url": public_url})
    with TestClient(create_app(exposed)) as client:
        headers = cookie | {"Host": host, "Origin": origin}
        assert client.delete("/session", headers=headers).status_code == (204 if may else 403)


@pytest.fixture
def crossing(settings: ServiceSettings) -> Iterator[TestClient]:
    """A service that allows pages of one other origin."""
    allowing = settings.model_copy(update={"allowed_origins": f"{ALLOWED},http://[::1]:3000"})
    with TestClient(create_app(allowing), raise_server_exceptions=False) as client:
        yield client


def preflight(client: TestClient, origin: str, **extra: str) -> dict[str, str]:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **extra}
    answer = client.options("/generate", headers=headers)
    found = {name: value for name, value in answer.headers.items() if "access-control" in name}
    return {"status": str(answer.status_code), **found}


def test_by_default_no_origin_is_allowed(client: TestClient, make_key: MakeKey) -> None:
    key = make_key("alice")
    assert preflight(client, ALLOWED) == {"status": "405"}
    read = client.get("/jobs", headers=key | {"Origin": ALLOWED})
    assert read.status_code == 200
    assert not [name for name in read.headers if name.startswith("access-control")]
    assert "vary" not in read.headers


def test_a_preflight(crossing: TestClient) -> None:
    asked = "authorization, content-type, idempotency-key, x-stainless-os"
    found = preflight(crossing, ALLOWED, **{"Access-Control-Request-Headers": asked})
    assert found["status"] == "200"
    assert found[CORS] == ALLOWED
    assert found["access-control-allow-headers"] == asked
    assert set(found["access-control-allow-methods"].split(", ")) == {
        *("GET", "HEAD", "POST", "DELETE")
    }
    assert "access-control-allow-credentials" not in found
    for origin in (FOREIGN, "null", "", f"{ALLOWED}:8443", f"{ALLOWED}.evil.example", OWN):
        assert preflight(crossing, origin) == {"status": "405"}


@pytest.mark.usefixtures("live_worker")
def test_an_allowed_page_uses_a_key(crossing: TestClient, make_key: MakeKey) -> None:
    page = make_key("alice") | sent("cross-site", ALLOWED)
    asked = crossing.post("/generate", json=ASK, headers=page)
    assert (asked.status_code, asked.headers[CORS]) == (202, ALLOWED)
    assert "access-control-allow-credentials" not in asked.headers
    assert "Location" in asked.headers["access-control-expose-headers"]
    assert "Origin" in asked.headers["vary"]
    assert asked.headers["x-content-type-options"] == "nosniff"
    job = asked.headers["location"]
    assert crossing.get(job, headers=page).json()["owner"] == "alice"
    assert crossing.post("/v1/videos", json=ASK, headers=page).status_code == 200
    assert crossing.delete(job, headers=page).status_code == 200
    # It can read why it is refused.
    for answer, status in (
        (crossing.get("/jobs", headers=sent(None, ALLOWED)), 401),
        (crossing.get("/workers", headers=page), 403),
        (crossing.get("/nowhere", headers=page), 404),
        (crossing.post("/generate", json={}, headers=page), 422),
        (crossing.post("/generate", json=ASK, headers=page | {"Host": "evil.example"}), 421),
        (crossing.post("/generate", json=ASK, headers=sent(None, ALLOWED)), 403),
    ):
        assert (answer.status_code, answer.headers[CORS]) == (status, ALLOWED)


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin", None])
def test_an_allowed_page_cannot_use_the_cookie(
    crossing: TestClient, make_key: MakeKey, sign_in: SignIn, site: str | None
) -> None:
    key = make_key("alice")
    cookie = {"Cookie": sign_in(key, crossing)["Cookie"]}
    page = sent(site, ALLOWED)
    assert crossing.post("/generate", json=ASK, headers=cookie | page).status_code == 403
    assert crossing.delete("/session", headers=cookie | page).status_code == 403
    read = crossing.get("/jobs", headers=cookie | page)
    assert "access-control-allow-credentials" not in read.headers  # so the browser hides it
    # Nor does it sign in or out with a key: the browser keeps the cookie for own pages.
    for method, query in (("POST", ""), ("DELETE", ""), ("DELETE", "?all=true")):
        answer = crossing.request(method, f"/session{query}", headers=key | page)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert crossing.get("/session", headers=key | page).json()["name"] == "alice"
    assert crossing.get("/session", headers=cookie).status_code == 200


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("origin", [FOREIGN, "null", f"{ALLOWED}:8443", "http://app.example"])
def test_other_pages_get_nothing_though_one_is_allowed(
    crossing: TestClient, make_key: MakeKey, origin: str
) -> None:
    page = make_key("alice") | {"Origin": origin}
    assert crossing.post("/generate", json=ASK, headers=page).status_code == 403
    read = crossing.get("/jobs", headers=page)
    assert not [name for name in read.headers if name.startswith("access-control")]
    assert read.headers["vary"] == "Origin"  # a cache must not give it to an allowed page
    plain = crossing.get("/jobs", headers={"Authorization": page["Authorization"]})
    assert plain.headers["vary"] == "Origin"
