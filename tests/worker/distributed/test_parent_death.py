"""Test that a rank ends with its torchrun, and that no other worker asks for that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.waiting import wait_until
from worker.distributed.parent_death import VARIABLE

ROOT = Path(__file__).resolve().parents[3]
# A command of the worker that takes no model, and then a rank at work.
RANK = """
import os, sys, time
import worker.__main__ as entry
sys.argv = ["worker", "doctor", "--ready"]
try:
    entry.run()
except SystemExit:
    print(os.getpid(), flush=True)
time.sleep(60)
"""
# As torchrun does it: a session for each rank, and a thread that waits.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True).wait()
"""


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("is_torchrun", [True, False])
def test_a_rank_ends_with_its_torchrun(is_torchrun: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        cwd=ROOT,
        env=environment | ({VARIABLE: "a-run"} if is_torchrun else {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    lines = map(str.strip, launcher.stdout)
    rank = int(next(line for line in lines if line.isdigit()))
    try:
        launcher.kill()
        launcher.wait()
        if is_torchrun:
            wait_until(lambda: has_ended(rank), 10, every_s=0.02)
        else:
            time.sleep(0.3)  # as long as a death takes
            assert not has_ended(rank)
    finally:
        launcher.stdout.close()
        if not has_ended(rank):
            os.kill(rank, signal.SIGKILL)
