"""The artifact folder: whole files only, and no way out of it."""

from pathlib import Path

import pytest

from jobs.artifacts import FolderArtifactStore, artifact_key, open_artifacts
from jobs.errors import ArtifactRefused


@pytest.fixture
def artifacts(tmp_path: Path) -> FolderArtifactStore:
    return FolderArtifactStore(tmp_path / "root")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(b"video" * 1000)
    return path


def test_put_stores_a_whole_copy(artifacts: FolderArtifactStore, source: Path) -> None:
    key = artifact_key("01a2", 1)
    path = artifacts.put(key, source)
    assert path == artifacts.path(key)
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each for each in artifacts.root.rglob("*") if each.is_file()] == [path]


def test_put_replaces(artifacts: FolderArtifactStore, source: Path) -> None:
    artifacts.put("a.mp4", source)
    source.write_bytes(b"other")
    assert artifacts.put("a.mp4", source).read_bytes() == b"other"


def test_failed_put_leaves_nothing(artifacts: FolderArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artifacts.put("videos/a.mp4", tmp_path / "missing.mp4")
    assert [each for each in artifacts.root.rglob("*") if each.is_file()] == []


def test_delete_removes_the_file_and_only_it(artifacts: FolderArtifactStore, source: Path) -> None:
    kept = artifacts.put(artifact_key("01a2", 2), source)
    gone = artifacts.put(artifact_key("01a2", 1), source)
    for _ in range(2):  # what is gone may be deleted again
        artifacts.delete(artifact_key("01a2", 1))
        assert not gone.exists()
        assert kept.exists()
    with pytest.raises(ArtifactRefused):
        artifacts.delete("../made.mp4")
    assert source.exists()


def test_attempts_have_their_own_keys() -> None:
    assert artifact_key("j", 1) != artifact_key("j", 2) != artifact_key("k", 2)


@pytest.mark.parametrize(
    "key",
    [
        *("", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "~/x", "a\\b"),
        *("a b", "a\0b", ".hidden", "a/.incoming-1", "é.mp4", "a\n", "..", "."),
    ],
)
def test_bad_keys_are_refused(artifacts: FolderArtifactStore, key: str) -> None:
    with pytest.raises(ArtifactRefused):
        artifacts.path(key)


def test_link_out_of_the_root_is_refused(artifacts: FolderArtifactStore, tmp_path: Path) -> None:
    (artifacts.root / "out").symlink_to(tmp_path)
    with pytest.raises(ArtifactRefused, match="leads out"):
        artifacts.path("out/made.mp4")


def test_open_reads_a_file_address(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    assert open_artifacts(folder.as_uri()).root == folder
    assert folder.is_dir()


@pytest.mark.parametrize("url", ["s3://bucket/x", "/plain/path", "file://host/x", "file:x", ""])
def test_other_addresses_are_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(ArtifactRefused, match="file:///absolute/folder"):
        open_artifacts(url)
