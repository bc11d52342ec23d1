"""Test what every artifact store must do, with a folder and with a bucket of a real S3 server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.artifacts.store import (
    ArtifactStore,
    artifact_key,
    open_artifacts,
    spritesheet_key,
    thumbnail_key,
)
from jobs.errors import ArtifactRefused, ArtifactsUnavailable

DATA = bytes(range(256)) * 10_000


@pytest.fixture
def artifacts(each_artifacts_url: str) -> ArtifactStore:
    return open_artifacts(each_artifacts_url)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(DATA)
    return path


def content(artifacts: ArtifactStore, key: str) -> bytes:
    size = artifacts.size(key)
    assert size is not None
    return b"".join(artifacts.read(key, 0, size))


def test_put_stores_a_whole_copy(artifacts: ArtifactStore, source: Path) -> None:
    key = artifact_key("01a2", "1")
    assert artifacts.size(key) is None
    artifacts.put(key, source)
    assert artifacts.size(key) == len(DATA)
    assert content(artifacts, key) == DATA
    assert source.exists()


def test_put_replaces(artifacts: ArtifactStore, source: Path) -> None:
    artifacts.put("a.mp4", source)
    source.write_bytes(b"other")
    artifacts.put("a.mp4", source)
    assert content(artifacts, "a.mp4") == b"other"


def test_put_without_a_source_leaves_nothing(artifacts: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artifacts.put("videos/a.mp4", tmp_path / "missing.mp4")
    assert list(artifacts.list()) == []


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (5, 5), (1, 2_000_000), (len(DATA) - 1, len(DATA)), (262_143, 262_145)],
)
def test_read_gives_the_bytes_asked_for(
    artifacts: ArtifactStore, source: Path, start: int, end: int
) -> None:
    artifacts.put("a.mp4", source)
    assert b"".join(artifacts.read("a.mp4", start, end)) == DATA[start:end]


def test_read_comes_in_parts(artifacts: ArtifactStore, source: Path) -> None:
    artifacts.put("a.mp4", source)
    assert max(map(len, artifacts.read("a.mp4", 0, len(DATA)))) <= 1024 * 1024


def test_reading_what_is_gone_is_an_error(artifacts: ArtifactStore) -> None:
    with pytest.raises(ArtifactsUnavailable):
        next(artifacts.read("a.mp4", 0, 1))


def test_delete_removes_the_artifact_and_only_it(artifacts: ArtifactStore, source: Path) -> None:
    kept, gone = artifact_key("01a2", "2"), artifact_key("01a2", "1")
    artifacts.put(kept, source)
    artifacts.put(gone, source)
    for _ in range(2):  # a deletion may be repeated
        artifacts.delete(gone)
        assert [each.key for each in artifacts.list()] == [kept]
    with pytest.raises(ArtifactRefused):
        artifacts.delete("../made.mp4")
    assert source.exists()


def test_list_names_what_is_below_a_prefix(artifacts: ArtifactStore, source: Path) -> None:
    keys = {artifact_key("01a2", "1"), artifact_key("01a2", "2"), "videosother/a.mp4", "b.mp4"}
    for key in keys:
        artifacts.put(key, source)
    assert {each.key for each in artifacts.list()} == keys
    assert {each.key for each in artifacts.list("videos")} == {
        artifact_key("01a2", "1"),
        artifact_key("01a2", "2"),
    }
    assert list(artifacts.list("none")) == []
    for each in artifacts.list():
        assert each.bytes == len(DATA)
        assert abs(datetime.now(UTC) - each.modified_at) < timedelta(minutes=5)


def test_neither_a_folder_nor_something_below_an_artifact_is_one(
    artifacts: ArtifactStore, source: Path
) -> None:
    artifacts.put("videos/a.mp4", source)
    for key in ("videos", "videos/a.mp4/b.mp4"):
        assert artifacts.size(key) is None
        artifacts.delete(key)
    assert list(artifacts.list("videos/a.mp4")) == []
    assert [each.key for each in artifacts.list()] == ["videos/a.mp4"]


def test_probe_leaves_nothing(artifacts: ArtifactStore) -> None:
    artifacts.probe()
    assert list(artifacts.list()) == []


def test_attempts_have_their_own_keys() -> None:
    assert artifact_key("j", "1") != artifact_key("j", "2") != artifact_key("k", "2")


def test_pictures_are_beside_their_video() -> None:
    keys = {make("j", "1") for make in (artifact_key, thumbnail_key, spritesheet_key)}
    assert len(keys) == 3
    assert {key.rpartition("/")[0] for key in keys} == {"videos/j"}


@pytest.mark.parametrize(
    "key",
    [
        *("", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "~/x", "a\\b"),
        *("a b", "a\0b", ".hidden", "a/.incoming-1", "é.mp4", "a\n", "..", ".", "a%2e%2e/b"),
    ],
)
def test_bad_keys_are_refused(artifacts: ArtifactStore, source: Path, key: str) -> None:
    uses = (
        lambda: artifacts.put(key, source),
        lambda: artifacts.size(key),
        lambda: list(artifacts.read(key, 0, 1)),
        lambda: artifacts.delete(key),
        lambda: list(artifacts.list(key or "../x")),  # no prefix is everything
    )
    for use in uses:
        with pytest.raises(ArtifactRefused):
            use()
