"""Test the artifact bucket with a server that fails, is down, refuses, is full, or with a kill."""

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from jobs.artifacts.bucket import BucketArtifactStore, signed_origin
from jobs.artifacts.s3_url import BucketAddress
from jobs.artifacts.store import thumbnail_key
from jobs.errors import AppError, ArtifactNotStored, ArtifactsUnavailable, GenerationCancelled
from tests.support.s3_server import FaultyProxy

KEY = "videos/01a2/1.mp4"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def direct(bucket: str, s3_endpoint: str) -> BucketArtifactStore:
    return BucketArtifactStore(BucketAddress(bucket, "wan", s3_endpoint))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(b"v" * 300_000)
    return path


def through_proxy(proxy: FaultyProxy, bucket: str, retry_for_s: float = 0.5) -> BucketArtifactStore:
    return BucketArtifactStore(BucketAddress(bucket, "wan", proxy.endpoint), retry_for_s)


def test_the_object_has_its_prefix_and_its_type(
    direct: BucketArtifactStore, bucket: str, s3_endpoint: str, source: Path
) -> None:
    whole = S3Store(bucket, endpoint=s3_endpoint, client_options={"allow_http": True})
    for key, kind in ((KEY, "video/mp4"), (thumbnail_key("01a2", "1"), "image/webp")):
        direct.put(key, source)
        assert obstore.get(whole, f"wan/{key}").attributes["Content-Type"] == kind


def test_a_file_too_large_for_one_request_goes_in_parts(
    direct: BucketArtifactStore, source: Path
) -> None:
    os.truncate(source, 17 * 1024 * 1024)
    direct.put(KEY, source)
    assert direct.size(KEY) == 17 * 1024 * 1024


def test_objects_that_are_not_ours_are_not_listed(
    direct: BucketArtifactStore, bucket: str, s3_endpoint: str, source: Path
) -> None:
    direct.put(KEY, source)
    for name in ("wan/odd%20name", "elsewhere/a.mp4"):
        url = f"{s3_endpoint}/{bucket}/{name}"
        asked = urllib.request.Request(url, data=b"x", method="PUT")
        urllib.request.urlopen(asked, timeout=30).close()
    assert [each.key for each in direct.list()] == [KEY]


def test_the_environment_does_not_outrank_the_address(
    bucket: str, s3_endpoint: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    artifacts = BucketArtifactStore(BucketAddress(bucket, "", s3_endpoint), retry_for_s=0)
    artifacts.put(KEY, source)
    assert artifacts.size(KEY) == 300_000


def test_plain_http_must_be_asked_for(
    bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with pytest.raises(ArtifactsUnavailable):
        BucketArtifactStore(BucketAddress(bucket)).size(KEY)


def test_a_server_that_comes_back_gets_the_video(
    proxy: FaultyProxy, bucket: str, direct: BucketArtifactStore, source: Path
) -> None:
    proxy.is_open = False
    checked = threading.Event()

    def check() -> None:
        checked.set()
        proxy.is_open = True

    through_proxy(proxy, bucket, retry_for_s=60).put(KEY, source, check)
    assert checked.is_set()
    assert direct.size(KEY) == 300_000


def test_a_server_that_stays_down_is_reported(
    proxy: FaultyProxy, bucket: str, source: Path
) -> None:
    proxy.is_open = False
    artifacts = through_proxy(proxy, bucket)
    with pytest.raises(ArtifactNotStored, match="does not answer") as caught:
        artifacts.put(KEY, source)
    assert "127.0.0.1" not in caught.value.detail
    uses = (
        lambda: artifacts.size(KEY),
        lambda: list(artifacts.list()),
        lambda: list(artifacts.read(KEY, 0, 1)),
        lambda: artifacts.delete(KEY),
    )
    for use in uses:
        with pytest.raises(ArtifactsUnavailable, match="does not answer"):
            use()


def test_a_cancel_ends_the_waiting(proxy: FaultyProxy, bucket: str, source: Path) -> None:
    proxy.is_open = False

    def check() -> None:
        raise GenerationCancelled("The job was cancelled.")

    with pytest.raises(GenerationCancelled):
        through_proxy(proxy, bucket, retry_for_s=1000).put(KEY, source, check)


def http(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code></Error>"
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "sentence", "retry_for_s"),
    [
        (http("403 Forbidden", "AccessDenied"), "refuses the credentials", 1000),
        (http("404 Not Found", "NoSuchBucket"), "does not exist", 1000),
        (http("507 Insufficient Storage", "XMinioStorageFull"), "disk .* is full", 0.5),
        (http("503 Service Unavailable", "SlowDown"), "answers with errors", 0.5),
    ],
)
def test_the_error_of_the_server_is_reported(
    proxy: FaultyProxy, bucket: str, source: Path, answer: bytes, sentence: str, retry_for_s: float
) -> None:
    """The faults with 1000 s are permanent, so they are never retried for so long."""
    proxy.answer = answer
    artifacts = through_proxy(proxy, bucket, retry_for_s)
    with pytest.raises(ArtifactNotStored, match=sentence):
        artifacts.put(KEY, source)
    with pytest.raises(ArtifactsUnavailable, match=f"{bucket} cannot be used: .*{sentence}"):
        artifacts.probe()


def test_a_missing_bucket_is_reported(s3_endpoint: str, bucket: str, source: Path) -> None:
    artifacts = BucketArtifactStore(BucketAddress("none-such", "", s3_endpoint), retry_for_s=1000)
    with pytest.raises(ArtifactNotStored, match="does not exist"):
        artifacts.put(KEY, source)
    with pytest.raises(ArtifactsUnavailable, match="none-such cannot be used"):
        artifacts.probe()


@pytest.mark.parametrize(
    ("set_variables", "sentence"),
    [({}, "there are no credentials"), ({"AWS_ACCESS_KEY_ID": "key"}, "Missing SecretAccessKey")],
)
def test_missing_credentials_are_reported(
    s3_endpoint: str,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    set_variables: dict[str, str],
    sentence: str,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    for name, value in set_variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AppError, match=sentence):
        BucketArtifactStore(BucketAddress(bucket, "", s3_endpoint)).probe()


PUTTING = """
import sys
from pathlib import Path
from jobs.artifacts.store import open_artifacts
open_artifacts(sys.argv[1]).put(sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.parametrize("mib", [4, 40])  # in one request, and in parts
def test_a_put_that_is_killed_half_way_leaves_nothing_visible(
    proxy: FaultyProxy, bucket: str, direct: BucketArtifactStore, source: Path, mib: int
) -> None:
    os.truncate(source, mib * 1024 * 1024)
    proxy.pause_after = 3 * 1024 * 1024
    url = f"s3://{bucket}/wan?endpoint={proxy.endpoint}"
    with subprocess.Popen([sys.executable, "-c", PUTTING, url, KEY, str(source)]) as process:
        try:
            assert proxy.paused.wait(60)
        finally:
            process.kill()
    assert direct.size(KEY) is None
    assert list(direct.list()) == []


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("s3://videos/a?region=eu-central-1", "https://s3.eu-central-1.amazonaws.com"),
        ("s3://videos?region=eu-west-1&style=virtual", "https://videos.s3.eu-west-1.amazonaws.com"),
        ("s3://videos/a?endpoint=http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("s3://videos?endpoint=https://host.example&style=virtual", "https://videos.host.example"),
    ],
)
def test_the_origin_of_signed_urls_is_known_without_the_buckets_keys(
    address: str, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert signed_origin(address) == origin
