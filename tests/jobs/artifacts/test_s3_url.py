"""Test ARTIFACTS_URL: which addresses are accepted, and which are refused with which error."""

from pathlib import Path

import pytest

from jobs.artifacts.bucket import BucketArtifactStore
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.s3_url import BucketAddress
from jobs.artifacts.store import open_artifacts
from jobs.errors import ArtifactRefused


def test_open_reads_a_file_address(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    artifacts = open_artifacts(folder.as_uri())
    assert isinstance(artifacts, FolderArtifactStore)
    assert artifacts.root == folder
    assert folder.is_dir()


def test_open_sends_no_request_to_a_bucket() -> None:
    url = "s3://bucket/wan?endpoint=https://127.0.0.1:1"
    assert isinstance(open_artifacts(url), BucketArtifactStore)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://videos", BucketAddress("videos")),
        ("s3://videos/", BucketAddress("videos")),
        ("s3://videos/wan/14b/", BucketAddress("videos", "wan/14b")),
        (
            "s3://videos?endpoint=http://127.0.0.1:9000/&region=eu-west-1&style=path",
            BucketAddress("videos", "", "http://127.0.0.1:9000", "eu-west-1", "path"),
        ),
        (
            "s3://videos?endpoint=https%3A%2F%2F%5B%3A%3A1%5D%3A9000",
            BucketAddress("videos", "", "https://[::1]:9000"),
        ),
    ],
)
def test_bucket_addresses(url: str, address: BucketAddress) -> None:
    assert BucketAddress.parse(url) == address


def test_style_puts_the_bucket_into_the_path_or_into_the_host() -> None:
    url = "s3://videos?endpoint=https://minio:9000&style="
    assert BucketAddress.parse(url + "path").server == "https://minio:9000"
    assert BucketAddress.parse(url + "virtual").server == "https://videos.minio:9000"
    assert BucketAddress.parse("s3://videos?style=virtual").server is None


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "/plain/path", "file://host/x", "file:x", "file:///a%00b", "", "S3://b"],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ArtifactRefused, match="ARTIFACTS_URL"):
        open_artifacts(url)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("s3://", "bucket"),
        ("s3://Videos", "bucket"),
        ("s3://videos:9000/x", "bucket"),
        ("s3://[videos", "text"),
        ("s3://videos/../x", "prefix"),
        ("s3://videos/a//b", "prefix"),
        ("s3://videos?endpoint=minio:9000", "endpoint"),
        ("s3://videos?endpoint=ftp://minio", "endpoint"),
        ("s3://videos?endpoint=https://minio/path", "endpoint"),
        ("s3://videos?style=host", "style"),
        ("s3://videos?region=", "query"),
        ("s3://videos?region=a&region=b", "query"),
        ("s3://videos?allow_http=true", "query"),
    ],
)
def test_the_part_that_is_wrong_is_named(url: str, part: str) -> None:
    with pytest.raises(ArtifactRefused, match=f"The {part} of ARTIFACTS_URL is"):
        open_artifacts(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@videos",
        "s3://videos?endpoint=https://key:hunter2@minio",
        "s3://videos?secret_access_key=hunter2",
    ],
)
def test_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ArtifactRefused) as caught:
        open_artifacts(url)
    assert "hunter2" not in str(caught.value)
