"""Test signed video links: which give access to a video without a key, and which do not."""

import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from jobs import redis_keys
from jobs.errors import LinkRefused
from service.app import create_app
from service.schemas.video_url import SECRET_READ_EVERY_S, LinkSigner, video_path
from service.settings import ServiceSettings
from tests.service.conftest import VIDEO_BYTES, MakeJob, MakeKey

TTL_S = 3600


@pytest.fixture
def signer(redis: Redis) -> LinkSigner:
    """A signer with the secret of the service over the same Redis."""
    return LinkSigner(redis, None, TTL_S)


@pytest.fixture
def alice(make_key: MakeKey) -> dict[str, str]:
    return make_key("alice")


@pytest.fixture
def link(client: TestClient, alice: dict[str, str], make_job: MakeJob) -> str:
    """The path and query of the link in a job's JSON."""
    job = make_job("alice", video=True)
    url = client.get(f"/jobs/{job.id}", headers=alice).json()["video"]["url"]
    return str(url).removeprefix("http://testserver")


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_link_opens_its_video_without_a_key(client: TestClient, link: str) -> None:
    assert client.get(link).content == VIDEO_BYTES
    assert client.head(link).status_code == 200
    part = client.get(link, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, VIDEO_BYTES[5:10])
    assert client.get(urlsplit(link).path).status_code == 401


def test_a_link_lasts_as_long_as_configured(link: str) -> None:
    (expires,) = parse_qs(urlsplit(link).query)["expires"]
    assert TTL_S - 5 <= int(expires) - time.time() <= TTL_S + 60


def test_who_polls_sees_the_same_link(signer: LinkSigner) -> None:
    first = signer.sign("/jobs/a/video.mp4", now=600.5)
    assert signer.sign("/jobs/a/video.mp4", now=659.9) == first
    assert signer.sign("/jobs/a/video.mp4", now=661) != first


Alter = Callable[[str, dict[str, str]], tuple[str, dict[str, str]]]

ALTERATIONS: dict[str, Alter] = {
    "later expiry": lambda p, q: (p, {**q, "expires": str(int(q["expires"]) + 1)}),
    "leading zero": lambda p, q: (p, {**q, "expires": "0" + q["expires"]}),
    "other digits": lambda p, q: (p, {**q, "expires": q["expires"].replace("1", "١")}),
    "last character": lambda p, q: (p, {**q, "signature": q["signature"][:-1] + "x"}),
    "cut": lambda p, q: (p, {**q, "signature": q["signature"][:-1]}),
    "longer": lambda p, q: (p, {**q, "signature": q["signature"] + "0"}),
    "capitals": lambda p, q: (p, {**q, "signature": q["signature"].upper()}),
    "no signature": lambda p, q: (p, {"expires": q["expires"]}),
    "empty signature": lambda p, q: (p, {**q, "signature": ""}),
    "no expiry": lambda p, q: (p, {"signature": q["signature"]}),
    "not ASCII": lambda p, q: (p, {**q, "signature": "é💥\x00"}),
    "huge": lambda p, q: (p, {"expires": "9" * 5000, "signature": "0" * 5000}),
    "another job": lambda p, q: (p.replace("/jobs/", "/jobs/0"), q),
}


@pytest.mark.parametrize("alteration", ALTERATIONS.values(), ids=ALTERATIONS.keys())
def test_an_altered_link_is_refused(client: TestClient, link: str, alteration: Alter) -> None:
    parts = urlsplit(link)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    path, altered = alteration(parts.path, query)
    answer = client.get(f"{path}?{urlencode(altered)}")
    assert code(answer) == (403, "link_refused")
    assert "signature does not fit" in answer.json()["detail"]


def test_an_expired_link_says_so(client: TestClient, link: str, signer: LinkSigner) -> None:
    old = signer.sign(urlsplit(link).path, now=time.time() - TTL_S - 61)
    answer = client.get(old)
    assert code(answer) == (403, "link_refused")
    assert "has expired" in answer.json()["detail"]


def test_a_link_is_for_its_own_video_only(client: TestClient, link: str, make_job: MakeJob) -> None:
    query = urlsplit(link).query
    other = make_job("alice", video=True)
    assert code(client.get(f"{video_path(other.id)}?{query}")) == (403, "link_refused")


def test_a_link_reads_and_does_nothing_else(client: TestClient, link: str) -> None:
    path, _, query = link.partition("?")
    job = path.removesuffix("/video.mp4")
    for method, target in (("GET", job), ("DELETE", job), ("GET", "/jobs"), ("POST", "/generate")):
        assert client.request(method, f"{target}?{query}").status_code == 401
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert client.request(method, link).status_code == 405
        trick = {"X-HTTP-Method-Override": method}
        assert client.get(link, headers=trick).content == VIDEO_BYTES


def test_a_key_does_without_the_link_and_a_link_without_the_right_key(
    client: TestClient, link: str, alice: dict[str, str], make_key: MakeKey
) -> None:
    bob = make_key("bob")
    path = urlsplit(link).path
    broken = f"{path}?expires=1&signature=0"
    assert client.get(broken, headers=alice).content == VIDEO_BYTES
    assert client.get(link, headers=bob).content == VIDEO_BYTES
    assert code(client.get(broken, headers=bob)) == (404, "job_not_found")
    assert code(client.get(broken)) == (403, "link_refused")


def test_a_link_in_an_open_service_is_signed_all_the_same(
    client: TestClient, make_job: MakeJob
) -> None:
    job = make_job(video=True)
    url = client.get(f"/jobs/{job.id}").json()["video"]["url"]
    assert client.get(url).content == VIDEO_BYTES
    assert code(client.get(url + "0")) == (403, "link_refused")
    assert client.get(video_path(job.id)).content == VIDEO_BYTES


def test_all_processes_sign_with_one_secret(
    settings: ServiceSettings, link: str, redis: Redis
) -> None:
    with TestClient(create_app(settings)) as another:
        assert another.get(link).content == VIDEO_BYTES
    assert redis.ttl(redis_keys.URL_SECRET) == -1


def test_a_secret_that_is_replaced_voids_all_links_within_ten_seconds(redis: Redis) -> None:
    now = [0.0]
    signer = LinkSigner(redis, None, TTL_S, clock=lambda: now[0])
    path = "/jobs/a/video.mp4"

    def opens(link: str) -> bool:
        query = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        try:
            signer.check(path, query["expires"], query["signature"])
        except LinkRefused:
            return False
        return True

    old = signer.sign(path)
    for replace in (lambda: redis.set(redis_keys.URL_SECRET, "b" * 64), redis.flushdb):
        replace()
        now[0] += SECRET_READ_EVERY_S - 0.1
        assert opens(old)
        now[0] += 0.1
        assert not opens(old)
        old = signer.sign(path)
        assert opens(old)


def test_a_configured_secret_is_used_and_not_stored(
    settings: ServiceSettings, redis: Redis, make_job: MakeJob
) -> None:
    job = make_job(video=True)
    links = []
    for secret in ("a" * 32, "b" * 32):
        configured = settings.model_copy(update={"url_secret": SecretStr(secret)})
        with TestClient(create_app(configured)) as client:
            links.append(client.get(f"/jobs/{job.id}").json()["video"]["url"])
            assert client.get(links[-1]).content == VIDEO_BYTES
            refused = [each for each in links if client.get(each).status_code == 403]
            assert refused == links[:-1]
    assert not redis.exists(redis_keys.URL_SECRET)
