"""Test that probes learn from a file whether the worker serves, however it ended."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from worker.process.ready_file import READY, VARIABLE, ReadyFile, why_not_ready
from worker.process.scratch import scratch_folder

SERVE = """
import sys, time
from pathlib import Path
from worker.process.ready_file import ReadyFile
file = ReadyFile(Path(sys.argv[1]))
file.mark("a worker")
print("marked", flush=True)
time.sleep(30)
"""


@pytest.fixture(autouse=True)
def _separate_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_worker_is_ready_from_mark_to_clear() -> None:
    assert "no worker runs" in str(why_not_ready())
    with scratch_folder() as scratch:
        file = ReadyFile(scratch / READY)
        assert "the worker does not serve, or not yet" in str(why_not_ready())
        file.mark("a worker")
        file.mark("a worker")
        assert why_not_ready() is None
        assert (scratch / READY).read_text() == "a worker\n"
        assert sorted(each.name for each in scratch.iterdir()) == ["in-use", READY]
        file.clear()
        file.clear()
        assert "the worker does not serve" in str(why_not_ready())


def test_a_probe_of_another_user_may_look(tmp_path: Path) -> None:
    """It has to open the file; systemd's unit starts workers with the umask 0027."""
    before = os.umask(0o027)
    try:
        file = ReadyFile(tmp_path / "ready")
        file.mark("a worker")
    finally:
        os.umask(before)
    assert (tmp_path / "ready").stat().st_mode & 0o777 == 0o644
    file.clear()


def test_a_file_that_somebody_removed_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    file = ReadyFile(path)
    file.mark("a worker")
    path.unlink()
    file.mark("a worker")
    assert path.exists()
    file.clear()


def test_a_killed_worker_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ready"
    monkeypatch.setenv(VARIABLE, str(path))
    command = [sys.executable, "-c", SERVE, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert why_not_ready() is None
        process.kill()
    assert path.exists()
    assert why_not_ready() == f"the worker that wrote {path} has ended"


def test_several_workers_need_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scratch_folder() as first, scratch_folder():
        one = ReadyFile(first / READY)
        one.mark("a worker")
        assert f"give each its own {VARIABLE}" in str(why_not_ready())
        file = ReadyFile(tmp_path / "own")
        file.mark("a worker")
        monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
        assert why_not_ready() is None
        one.clear()
        file.clear()


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ReadyFile(tmp_path / "none" / "ready")
    with caplog.at_level(logging.WARNING):
        file.mark("a worker")
        file.mark("a worker")
    assert len(caplog.records) == 1
    assert f"set {VARIABLE} to a file that it may write" in caplog.text


def test_the_probe_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['worker', 'doctor', '--ready']\n"
        "from worker.__main__ import run\n"
        "try: run()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    environment = os.environ | {VARIABLE: str(tmp_path / "own")}

    def probe() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    missing = probe()
    assert missing.stdout == "1 False\n"
    assert missing.stderr.startswith("not ready: the worker does not serve")
    file = ReadyFile(tmp_path / "own")
    file.mark("a worker")
    assert probe().stdout == "ready\n0 False\n"
    file.clear()
