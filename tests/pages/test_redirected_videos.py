"""Test that pages play videos to which the service redirects: from a bucket, another origin."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Request, expect
from redis import Redis

from deploy.local.waiting import wait_until
from jobs.artifacts.known_store import open_known_artifacts
from service.settings import ServiceSettings
from tests.pages.conftest import DESKTOP, Visit
from tests.pages.played_worker import PlayedWorker, make_files
from tests.support.requests import generation_request


@pytest.fixture
def scheme() -> str:
    return "light"


@pytest.fixture
def viewport() -> dict[str, int]:
    return DESKTOP


@pytest.fixture
def settings(settings: ServiceSettings, bucket: str, s3_endpoint: str) -> ServiceSettings:
    url = f"s3://{bucket}/wan?endpoint={s3_endpoint}"
    return settings.model_copy(update={"artifacts_url": url, "redirect_downloads": True})


def test_a_video_of_a_bucket_plays_under_the_pages_policy(
    visit: Visit,
    redis: Redis,
    settings: ServiceSettings,
    s3_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from_bucket: list[str] = []

    def note(request: Request) -> None:
        if request.url.startswith(s3_endpoint):
            from_bucket.append(urlsplit(request.url).path.rsplit(".", 1)[-1])

    visit.page.on("requestfinished", note)
    artifacts = open_known_artifacts(settings.artifacts_url, redis)
    artifacts.probe()
    files = make_files(tmp_path_factory.mktemp("files"))
    with PlayedWorker(redis, artifacts, files) as worker:
        request = generation_request(model="drawing", size="96x64", num_inference_steps=8)
        job = worker.store.create(request, worker.offer.queue).job
        worker.succeed(worker.take())
        page = visit.open(f"/jobs/{job.id}")
        video = page.locator("#cards video")
        expect(video).to_be_visible()
        wait_until(lambda: video.evaluate("video => video.currentTime") > 0, 30, "the video plays")
        assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [96, 64]
        page = visit.open("/")
        picture = page.locator("#gallery-list img")
        expect(picture).to_be_visible()
        assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") == 96
    assert {"mp4", "webp"} <= set(from_bucket)
    # The bucket is another host, which is what this is about; nothing else may go wrong.
    others = [fault for fault in visit.faults if f"asked another host: {s3_endpoint}" not in fault]
    assert others == []
    visit.faults.clear()
