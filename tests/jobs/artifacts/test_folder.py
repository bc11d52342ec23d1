"""Test the artifact folder: only complete files, after any fault, and no path out of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.artifacts.folder import FolderArtifactStore
from jobs.errors import ArtifactNotStored, ArtifactRefused, ArtifactsUnavailable

DAY_S = 24 * 3600


@pytest.fixture
def artifacts(tmp_path: Path) -> FolderArtifactStore:
    return FolderArtifactStore(tmp_path / "root", retry_for_s=0.5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(b"v" * 300_000)
    return path


def python(script: str, *args: object, prefix: tuple[str, ...] = ()) -> list[str]:
    return [*prefix, sys.executable, "-c", script, *map(str, args)]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_others_may_read_what_is_stored(artifacts: FolderArtifactStore, source: Path) -> None:
    artifacts.put("videos/a.mp4", source)
    assert artifacts.path("videos/a.mp4").stat().st_mode & 0o777 == 0o644
    assert files(artifacts.root) == ["videos/a.mp4"]


def test_link_out_of_the_root_is_refused(artifacts: FolderArtifactStore, tmp_path: Path) -> None:
    (artifacts.root / "out").symlink_to(tmp_path)
    with pytest.raises(ArtifactRefused, match="leads out"):
        artifacts.path("out/made.mp4")


def test_links_and_hidden_files_are_not_listed(
    artifacts: FolderArtifactStore, source: Path
) -> None:
    artifacts.put("a.mp4", source)
    (artifacts.root / "link.mp4").symlink_to(source)
    (artifacts.root / "folder").symlink_to(source.parent)
    (artifacts.root / ".incoming-x").touch()
    assert [each.key for each in artifacts.list()] == ["a.mp4"]


def test_a_file_cut_short_is_noticed(artifacts: FolderArtifactStore, source: Path) -> None:
    artifacts.put("a.mp4", source)
    with pytest.raises(ArtifactsUnavailable, match="ends at byte 300000"):
        list(artifacts.read("a.mp4", 0, 300_001))


def test_leftovers_go_after_a_day(artifacts: FolderArtifactStore, source: Path) -> None:
    artifacts.put("videos/kept/1.mp4", source)
    for folder in ("old", "new"):
        (artifacts.root / "videos" / folder).mkdir()
        (artifacts.root / "videos" / folder / ".incoming-x").write_bytes(b"half")
    (artifacts.root / "videos" / "empty").mkdir()
    long_ago = time.time() - DAY_S - 60
    for name in ("old/.incoming-x", "empty", "kept/1.mp4", "kept"):
        os.utime(artifacts.root / "videos" / name, (long_ago, long_ago))
    assert artifacts.remove_leftovers() == 1
    assert files(artifacts.root) == ["videos/kept/1.mp4", "videos/new/.incoming-x"]
    assert not (artifacts.root / "videos" / "empty").exists()


def test_a_permanent_fault_is_reported_at_once(
    artifacts: FolderArtifactStore, source: Path
) -> None:
    (artifacts.root / "videos").touch()  # where a folder must be
    retrying = FolderArtifactStore(artifacts.root, retry_for_s=1000)
    with pytest.raises(ArtifactNotStored, match="does not take it") as caught:
        retrying.put("videos/a.mp4", source)
    assert str(artifacts.root) not in caught.value.detail


LIMITED = """
import resource, sys, threading
from pathlib import Path
from jobs.artifacts.folder import FolderArtifactStore
from jobs.errors import ArtifactNotStored

root, source, frees_after = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
if frees_after:
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    threading.Timer(frees_after, lift).start()
try:
    FolderArtifactStore(root, retry_for_s=60 if frees_after else 0.5).put("videos/a.mp4", source)
    print("stored")
except ArtifactNotStored as error:
    print(error)
"""


def test_room_made_meanwhile_is_used(artifacts: FolderArtifactStore, source: Path) -> None:
    assert run(python(LIMITED, artifacts.root, source, 1)) == "stored\n"
    assert files(artifacts.root) == ["videos/a.mp4"]
    assert artifacts.size("videos/a.mp4") == 300_000


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from jobs.artifacts.folder import FolderArtifactStore
from jobs.errors import ArtifactNotStored

root, source = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", root], check=True)
try:
    FolderArtifactStore(root, retry_for_s=0.5).put("videos/a.mp4", source)
except ArtifactNotStored as error:
    print(error)
(root / "filler").write_bytes(b"x" * 150_000)  # there is room again
assert [path.name for path in root.rglob("*") if path.is_file()] == ["filler"]
"""


def no_room_cases() -> Iterator[object]:
    """A limit on file sizes works everywhere, a small disk only where a test may mount one."""
    yield pytest.param(LIMITED, (), "does not take it", id="limit")
    for user in ((), ("--user", "--map-root-user")):
        prefix = ("unshare", "--mount", *user)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            mount = [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"]
            subprocess.run(mount, check=True, capture_output=True)
            sentence = "the disk of the artifact store is full (No space left on device)"
            yield pytest.param(ON_A_SMALL_DISK, prefix, sentence, id="disk")
            return


@pytest.mark.parametrize(("script", "prefix", "sentence"), list(no_room_cases()))
def test_no_room_is_reported_and_leaves_nothing(
    artifacts: FolderArtifactStore,
    source: Path,
    script: str,
    prefix: tuple[str, ...],
    sentence: str,
) -> None:
    """The kernel fails a write half way."""
    assert sentence in run(python(script, artifacts.root, source, 0, prefix=prefix))
    assert files(artifacts.root) == []


PUTTING = """
import sys
from itertools import count
from pathlib import Path
from jobs.artifacts.folder import FolderArtifactStore

artifacts = FolderArtifactStore(Path(sys.argv[1]))
for number in count():
    artifacts.put(f"videos/{number}.mp4", Path(sys.argv[2]))
"""


def test_a_put_that_is_killed_half_way_leaves_nothing_visible(
    artifacts: FolderArtifactStore, source: Path
) -> None:
    size = 64 * 1024 * 1024
    os.truncate(source, size)
    with subprocess.Popen(python(PUTTING, artifacts.root, source)) as process:
        try:
            wait_until_half_written(process.pid, artifacts.root, size)
        finally:
            process.kill()
    assert [each for each in files(artifacts.root) if ".incoming-" in each]
    assert {each.bytes for each in artifacts.list()} <= {size}


def wait_until_half_written(pid: int, root: Path, size: int) -> None:
    """Stop the process (SIGSTOP) in the middle of a file."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        os.kill(pid, signal.SIGSTOP)
        sizes = [path.stat().st_size for path in root.glob("videos/.incoming-*")]
        if any(0 < each < size for each in sizes):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.003)
    raise TimeoutError("no file was seen half written")


def test_probe_reports_that_nothing_can_be_written(tmp_path: Path) -> None:
    artifacts = FolderArtifactStore(tmp_path / "root")
    artifacts.root.rmdir()
    with pytest.raises(ArtifactsUnavailable, match=f"written to the artifact folder {tmp_path}"):
        artifacts.probe()
