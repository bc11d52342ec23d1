"""Test that a slow artifact store slows nobody else, and that downloads are bounded."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest

from deploy.local.waiting import wait_until
from jobs.catalog import WorkerOffer
from jobs.record import JobRecord
from service.settings import ServiceSettings
from tests.service.conftest import THUMBNAIL_BYTES, VIDEO_BYTES, MakeJob, MakeKey
from tests.support.http_service import Site, serving
from tests.support.s3_server import FaultyProxy

LINKS = 45
ASK = {"prompt": "a small red circle"}


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_endpoint)
    yield proxy
    proxy.passes.set()
    proxy.close()


@pytest.fixture
def settings(settings: ServiceSettings, bucket: str, proxy: FaultyProxy) -> ServiceSettings:
    url = f"s3://{bucket}/wan?endpoint={proxy.endpoint}"
    return settings.model_copy(update={"artifacts_url": url, "public_url": None})


class Visitors:
    """Clients of a service, each with a thread of its own."""

    def __init__(self, site: Site, threads: ThreadPoolExecutor, proxy: FaultyProxy) -> None:
        self.downloads = site.downloads
        self.client = httpx2.Client(
            base_url=site.url,
            trust_env=False,
            timeout=60,
            limits=httpx2.Limits(max_connections=200),
        )
        self._threads = threads
        self._proxy = proxy

    def fetch(self, path: str, **headers: str) -> "Future[httpx2.Response]":
        return self._threads.submit(self.client.get, path, headers=headers)

    @contextmanager
    def slow_bucket(self) -> Iterator[None]:
        """The bucket answers nothing within the block."""
        self._proxy.passes.clear()
        try:
            yield
        finally:
            self._proxy.passes.set()


@contextmanager
def visiting(settings: ServiceSettings, proxy: FaultyProxy) -> Iterator[Visitors]:
    with ExitStack() as stack:
        site = stack.enter_context(serving(settings))
        threads = stack.enter_context(ThreadPoolExecutor(100))
        visitors = Visitors(site, threads, proxy)
        stack.enter_context(visitors.client)
        yield visitors


def path_of(job: JobRecord) -> str:
    return f"/jobs/{job.id}/video.mp4"


def test_a_slow_bucket_stalls_no_other_request(
    settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob, live_worker: WorkerOffer
) -> None:
    path = path_of(make_job(video=True))
    with visiting(settings, proxy) as visitors:
        with visitors.slow_bucket():
            links = [visitors.fetch(path) for _ in range(LINKS)]
            accepted = visitors.client.post("/generate", json=ASK)
            assert accepted.status_code == 202
            assert visitors.client.get(accepted.headers["location"]).status_code == 200
            assert visitors.client.get("/readyz").status_code == 200
            assert not any(link.done() for link in links)
        assert all(link.result().content == VIDEO_BYTES for link in links)


def test_downloads_are_bounded_by_key_and_in_all(
    settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob, make_key: MakeKey
) -> None:
    alice, bob = make_key("alice"), make_key("bob")
    hers, his = path_of(make_job("alice", video=True)), path_of(make_job("bob", video=True))
    limited = settings.model_copy(update={"max_downloads": 12})
    with visiting(limited, proxy) as visitors:
        # By a link, which needs no key, it is still her video.
        job = visitors.client.get(hers.removesuffix("/video.mp4"), headers=alice).json()
        link = job["video"]["url"].removeprefix(str(visitors.client.base_url).rstrip("/"))
        with visitors.slow_bucket():
            held = [visitors.fetch(hers, **alice) for _ in range(5)]
            held += [visitors.fetch(link) for _ in range(5)]
            wait_until(lambda: visitors.downloads.open == 10)
            answers = [visitors.fetch(path, **key) for path, key in [(hers, alice), (link, {})]]
            for answer in answers:
                refusal = answer.result()
                assert (refusal.status_code, refusal.json()["code"]) == (
                    429,
                    "too_many_own_downloads",
                )
                assert int(refusal.headers["retry-after"]) > 0
            held += [visitors.fetch(his, **bob) for _ in range(2)]
            wait_until(lambda: visitors.downloads.open == 12)
            refusal = visitors.fetch(his, **bob).result()
            assert (refusal.status_code, refusal.json()["code"]) == (503, "too_many_downloads")
            assert int(refusal.headers["retry-after"]) > 0
        assert [each.result().status_code for each in held] == [200] * 12
        wait_until(lambda: visitors.downloads.open == 0)
        again = [visitors.fetch(hers, **alice) for _ in range(10)]
        assert {each.result().status_code for each in again} == {200}


class TestRedirection:
    @pytest.fixture
    def settings(self, settings: ServiceSettings) -> ServiceSettings:
        return settings.model_copy(update={"redirect_downloads": True, "url_ttl_s": 600})

    def test_callers_are_sent_to_the_bucket(
        self, settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob
    ) -> None:
        job = make_job(video=True)
        with visiting(settings, proxy) as visitors:
            answer = visitors.client.get(path_of(job))
            assert (answer.status_code, answer.content) == (307, b"")
            assert answer.headers["cache-control"] == "no-store"
            target = answer.headers["location"]
            assert target.startswith(proxy.endpoint)
            assert "X-Amz-Expires=600" in urlsplit(target).query
            fetched = httpx2.get(target, headers={"range": "bytes=0-9"}, trust_env=False)
            assert (fetched.status_code, fetched.content) == (206, VIDEO_BYTES[:10])
            picture = path_of(job).replace("video.mp4", "thumbnail.webp")
            followed = visitors.client.get(picture, follow_redirects=True)
            assert (followed.status_code, followed.content) == (200, THUMBNAIL_BYTES)
            assert followed.headers["content-type"] == "image/webp"
            head = visitors.client.head(path_of(job), follow_redirects=True)
            assert head.headers["content-length"] == str(len(VIDEO_BYTES))

    def test_pages_may_load_from_the_bucket_and_from_nowhere_else(
        self, settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob
    ) -> None:
        with visiting(settings, proxy) as visitors:
            target = visitors.client.get(path_of(make_job(video=True))).headers["location"]
            bucket = "{0.scheme}://{0.netloc}".format(urlsplit(target))
            answer = visitors.client.get("/", headers={"accept": "text/html"})
            policy = answer.headers["content-security-policy"]
        directives = dict(each.strip().split(" ", 1) for each in policy.split(";"))
        assert directives["media-src"] == f"'self' {bucket}"
        assert directives["img-src"] == f"'self' data: {bucket}"
        assert directives["connect-src"] == f"'self' {bucket}"
        assert directives["script-src"] == "'self'"

    def test_only_who_may_see_the_video(
        self, settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob, make_key: MakeKey
    ) -> None:
        alice, bob = make_key("alice"), make_key("bob")
        job, queued = make_job("alice", video=True), make_job("alice")
        with visiting(settings, proxy) as visitors:
            for path, headers, status in (
                (path_of(job), {}, 401),
                (path_of(job), bob, 404),
                (path_of(job) + "?expires=1&signature=00", {}, 403),
                (path_of(queued), alice, 404),
                (path_of(job), alice, 307),
            ):
                assert visitors.client.get(path, headers=headers).status_code == status

    def test_a_slow_bucket_does_not_matter(
        self, settings: ServiceSettings, proxy: FaultyProxy, make_job: MakeJob
    ) -> None:
        job = make_job(video=True)
        with visiting(settings, proxy) as visitors:
            assert visitors.client.get(path_of(job)).status_code == 307  # the store was looked at
            with visitors.slow_bucket():
                assert visitors.client.get(path_of(job)).status_code == 307


def test_a_folder_has_nowhere_to_redirect_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTS_URL", "file:///tmp/a")
    monkeypatch.setenv("SERVICE_REDIRECT_DOWNLOADS", "1")
    with pytest.raises(ValueError, match="no bucket to redirect to"):
        ServiceSettings()
