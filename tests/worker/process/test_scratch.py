"""Test that folders of killed workers are removed, and those of living workers are not."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from worker.process.scratch import LOCK, PREFIX, UNLOCKED_S, remove_abandoned, scratch_folder

HOLD_FOLDER = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from worker.process.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "video.mp4").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _separate_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def hold_folder(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", HOLD_FOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_worker_leaves_is_removed_once_it_is_dead(tmp_path: Path) -> None:
    process, folder = hold_folder(tmp_path)
    with process:
        assert remove_abandoned(tmp_path) == 0
        assert (folder / "video.mp4").exists()
        process.send_signal(signal.SIGKILL)
    with scratch_folder() as own:
        assert not folder.exists()
        assert own.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_two_workers_have_two_folders() -> None:
    with scratch_folder() as one, scratch_folder() as two:
        assert one != two
        assert one.is_dir()


def test_what_only_looks_like_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}file").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}young").mkdir()
    (tmp_path / f".{PREFIX}unnamed").mkdir()
    assert remove_abandoned(tmp_path) == 0
    assert elsewhere.is_dir()
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_was_never_locked_goes_in_the_end(tmp_path: Path) -> None:
    for name in (f"{PREFIX}old", f".{PREFIX}old"):
        (tmp_path / name).mkdir()
        long_ago = (tmp_path / name).stat().st_mtime - UNLOCKED_S - 1
        os.utime(tmp_path / name, (long_ago, long_ago))
    assert remove_abandoned(tmp_path) == 2
