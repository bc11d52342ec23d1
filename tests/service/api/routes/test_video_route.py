"""Test `GET /jobs/{id}/video.mp4`: the whole file, ranges of it, and jobs without a video.

Every test runs with a folder and with a bucket.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.artifacts.store import ArtifactStore, artifact_key, open_artifacts
from jobs.catalog import WorkerOffer
from jobs.record import Failure, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings
from tests.support.s3_server import FaultyProxy

DATA = bytes(range(256)) * 8
SHA256 = hashlib.sha256(DATA).hexdigest()
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


@pytest.fixture
def settings(settings: ServiceSettings, each_artifacts_url: str) -> ServiceSettings:
    return settings.model_copy(update={"artifacts_url": each_artifacts_url})


@pytest.fixture
def artifacts(settings: ServiceSettings) -> ArtifactStore:
    return open_artifacts(settings.artifacts_url)


@pytest.fixture
def url(
    store: JobStore,
    artifacts: ArtifactStore,
    request_for_video: GenerationRequest,
    tmp_path: Path,
    client: TestClient,
) -> str:
    """The path of a finished video, as the job's JSON gives it."""
    attempt = store.claim(store.create(request_for_video, "q").job.id, "w")
    made = tmp_path / "made.mp4"
    made.write_bytes(DATA)
    key = artifact_key(attempt.job_id, attempt.label)
    artifacts.put(key, made)
    video = Video(
        key=key, bytes=len(DATA), sha256=SHA256, width=96, height=96, num_frames=17, fps=8
    )
    store.succeed(attempt, video, TIMINGS)
    return urlsplit(str(client.get(f"/jobs/{attempt.job_id}").json()["video"]["url"])).path


def test_whole_file(client: TestClient, url: str) -> None:
    answer = client.get(url)
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"] == f'"{SHA256}"'
    assert answer.headers["content-length"] == str(len(DATA))
    job_id = url.split("/")[2]
    assert answer.headers["content-disposition"] == f'inline; filename="{job_id}.mp4"'


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-9"}, {"range": "bytes=99999-"}])
def test_head(client: TestClient, url: str, headers: dict[str, str]) -> None:
    """RFC 9110 knows ranges for GET only."""
    answer = client.head(url, headers=headers)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(DATA))


@pytest.mark.parametrize(
    ("wanted", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=2000-", 2000, 2048),
        ("bytes=-5", 2043, 2048),
        ("bytes=2000-99999", 2000, 2048),
        ("bytes=-99999", 0, 2048),
        ("Bytes = 1-1", 1, 2),
    ],
)
def test_range(client: TestClient, url: str, wanted: str, first: int, end: int) -> None:
    answer = client.get(url, headers={"range": wanted})
    assert answer.status_code == 206
    assert answer.content == DATA[first:end]
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(end - first)


def test_several_ranges_get_the_whole_file(client: TestClient, url: str) -> None:
    answer = client.get(url, headers={"range": "bytes=0-9, 20-29"})
    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize("wanted", ["miles=1-2", "items=0-1,3-4", "x", "", "seconds=0.5-1"])
def test_a_range_in_another_unit_gets_the_whole_file(
    client: TestClient, url: str, wanted: str
) -> None:
    answer = client.get(url, headers={"range": wanted})
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["accept-ranges"] == "bytes"


LONG_AGO, YET_TO_COME = "Tue, 01 Jan 2019 00:00:00 GMT", "Thu, 01 Jan 2099 00:00:00 GMT"


def test_the_file_says_when_it_was_made(client: TestClient, url: str) -> None:
    answer = client.get(url)
    made_at = parsedate_to_datetime(answer.headers["last-modified"])
    assert answer.headers["last-modified"].endswith(" GMT")
    assert abs((datetime.now(UTC) - made_at).total_seconds()) < 60
    assert client.head(url).headers["last-modified"] == answer.headers["last-modified"]


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("if-match", "ETAG", 200),
        ("if-match", '"other", ETAG', 200),
        ("if-match", "*", 200),
        ("if-match", '"other"', 412),
        ("if-match", "W/ETAG", 412),
        ("if-unmodified-since", "MODIFIED", 200),
        ("if-unmodified-since", YET_TO_COME, 200),
        ("if-unmodified-since", LONG_AGO, 412),
        ("if-unmodified-since", "no date", 200),
        ("if-modified-since", "MODIFIED", 304),
        ("if-modified-since", YET_TO_COME, 304),
        ("if-modified-since", LONG_AGO, 200),
        ("if-modified-since", "no date", 200),
        ("if-none-match", "W/ETAG", 304),
    ],
)
def test_conditions(client: TestClient, url: str, header: str, value: str, status: int) -> None:
    whole = client.get(url)
    value = value.replace("ETAG", whole.headers["etag"])
    value = value.replace("MODIFIED", whole.headers["last-modified"])
    for method in ("GET", "HEAD"):
        answer = client.request(method, url, headers={header: value, "range": "bytes=0-9"})
        expected = 206 if status == 200 and method == "GET" else status
        assert answer.status_code == expected, answer.text
        if status == 412:
            assert method == "HEAD" or answer.json()["code"] == "precondition_failed"


def test_the_tag_counts_more_than_the_date(client: TestClient, url: str) -> None:
    etag = client.get(url).headers["etag"]
    both = {"if-match": etag, "if-unmodified-since": LONG_AGO}
    assert client.get(url, headers=both).status_code == 200
    other = {"if-none-match": '"other"', "if-modified-since": YET_TO_COME}
    assert client.get(url, headers=other).status_code == 200


def test_a_part_is_sent_for_the_same_date(client: TestClient, url: str) -> None:
    modified = client.get(url).headers["last-modified"]
    for since, status in ((modified, 206), (LONG_AGO, 200)):
        headers = {"range": "bytes=0-9", "if-range": since}
        assert client.get(url, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        ("bytes=2048-", 416, "range_not_satisfiable"),
        ("bytes=-0", 416, "range_not_satisfiable"),
        ("bytes=9-3", 400, "bad_request"),
        ("bytes=", 400, "bad_request"),
        ("bytes=-", 400, "bad_request"),
        ("bytes=0-1,x", 400, "bad_request"),
        ("bytes=" + "9" * 5000 + "-", 400, "bad_request"),
    ],
)
def test_bad_range_is_a_problem(
    client: TestClient, url: str, wanted: str, status: int, code: str
) -> None:
    answer = client.get(url, headers={"range": wanted})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize("tags", [f'"{SHA256}"', f'W/"{SHA256}"', f'"x", "{SHA256}"', "*"])
def test_held_copy_is_not_sent_again(client: TestClient, url: str, tags: str) -> None:
    answer = client.get(url, headers={"if-none-match": tags, "range": "bytes=0-9"})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == f'"{SHA256}"'


def test_if_range_with_another_tag_sends_everything(client: TestClient, url: str) -> None:
    headers = {"range": "bytes=0-9", "if-range": '"other"'}
    assert client.get(url, headers=headers).content == DATA
    headers["if-range"] = f'"{SHA256}"'
    assert client.get(url, headers=headers).content == DATA[:10]


def test_no_video_yet_or_ever(
    client: TestClient, store: JobStore, request_for_video: GenerationRequest
) -> None:
    job_id = store.create(request_for_video, "q").job.id
    for state in ("queued", "running", "failed"):
        if state == "running":
            attempt = store.claim(job_id, "w")
        if state == "failed":
            store.fail(attempt, Failure(code="generation_failed", detail="no"))
        answer = client.get(f"/jobs/{job_id}/video.mp4")
        assert answer.status_code == 404
        assert (answer.json()["code"], answer.json()["state"]) == ("video_not_ready", state)


def test_deleted_file_is_gone(client: TestClient, artifacts: ArtifactStore, url: str) -> None:
    for each in artifacts.list():
        artifacts.delete(each.key)
    for answer in (client.get(url), client.get(url, headers={"range": "bytes=0-9"})):
        assert (answer.status_code, answer.json()["code"]) == (410, "video_gone")


def test_a_file_that_is_not_the_one_stored_is_not_sent(
    client: TestClient, artifacts: ArtifactStore, url: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.mp4"
    other.write_bytes(DATA[:-1])
    for each in list(artifacts.list()):
        artifacts.put(each.key, other)
    assert client.get(url).json()["code"] == "video_gone"


def test_unknown_job(client: TestClient) -> None:
    assert client.get("/jobs/none/video.mp4").json()["code"] == "job_not_found"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_endpoint)
    yield proxy
    proxy.close()


class TestBucketBehindAProxy:
    @pytest.fixture
    def each_artifacts_url(self, proxy: FaultyProxy, bucket: str) -> str:
        return f"s3://{bucket}?endpoint={proxy.endpoint}"

    def test_a_bucket_that_is_away_is_a_problem_to_try_again(
        self, client: TestClient, url: str, proxy: FaultyProxy
    ) -> None:
        proxy.is_open = False
        answer = client.get(url)
        assert (answer.status_code, answer.json()["code"]) == (503, "artifacts_unavailable")
        assert "retry-after" in answer.headers
        assert "127.0.0.1" not in answer.json()["detail"]
        proxy.is_open = True
        assert client.get(url).content == DATA


def test_a_video_whose_store_is_missing_is_not_gone(
    client: TestClient, url: str, settings: ServiceSettings, redis: Redis
) -> None:
    """An empty mount point, or another bucket: 503, so that callers come back. 410 is for ever."""
    assert client.get(url).status_code == 200
    assert client.get(url.replace("video.mp4", "thumbnail.webp")).status_code == 404
    place, _, options = settings.artifacts_url.partition("?")
    elsewhere = f"{place}-elsewhere?{options}".rstrip("?")
    other = settings.model_copy(update={"artifacts_url": elsewhere})
    with TestClient(create_app(other)) as wrong:
        for answer in (
            wrong.get(url),
            wrong.head(url),
            wrong.get(url, headers={"Range": "bytes=0-1"}),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
        assert wrong.get(url).json()["code"] == "artifacts_unavailable"
        job_id = url.split("/")[2]
        assert wrong.delete(f"/v1/videos/{job_id}").status_code == 503
    assert client.get(url).content == DATA, "nothing was deleted, neither the record nor the file"


def test_a_video_that_was_removed_from_the_right_store_is_gone(
    client: TestClient, url: str, artifacts: ArtifactStore
) -> None:
    assert client.get(url).status_code == 200
    (stored,) = artifacts.list("videos")
    artifacts.delete(stored.key)
    assert client.get(url).status_code == 410


def test_the_service_looks_for_its_store_at_the_start(
    client: TestClient, url: str, settings: ServiceSettings, redis: Redis, live_worker: WorkerOffer
) -> None:
    assert client.get(url).status_code == 200
    redis.set(redis_keys.ARTIFACTS_ID, "0" * 32)  # another store was adopted
    with TestClient(create_app(settings)) as started:

        def noticed() -> bool:
            return "wan_artifacts_up 0.0" in str(started.get("/metrics").text)

        wait_until(noticed, 30, "the missing store is in the metrics")
        ready = started.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert "artifact store is missing" in ready.json()["warnings"][0]
