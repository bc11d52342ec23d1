"""Test that child processes never outlive the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy.local.child_process import Child, last_line
from deploy.local.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]

# Ignores SIGTERM and has a child of its own; prints both pids.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), own.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie that is not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(tmp_path: Path, code: str) -> Child:
    command = [sys.executable, "-c", code]
    return Child("test", command, log=tmp_path / "test.log", cwd=tmp_path, env=dict(os.environ))


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    child = start(tmp_path, STUBBORN)
    wait_until(lambda: last_line(child.log) != "")
    pids = [int(word) for word in last_line(child.log).split()]
    child.stop(0.3, lambda: False)
    assert child.exit_code == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_forced_stop_does_not_wait(tmp_path: Path) -> None:
    child = start(tmp_path, STUBBORN)
    wait_until(lambda: last_line(child.log) != "")
    child.stop(300, lambda: True)
    assert child.exit_code == -signal.SIGKILL


def test_a_child_that_handles_sigterm_exits_by_itself(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    child = start(tmp_path, code)
    wait_until(lambda: last_line(child.log) == "up")
    child.stop(30, lambda: False)
    assert child.exit_code == 7


def test_sigterm_is_sent_only_once(tmp_path: Path) -> None:
    """A second SIGTERM would make the worker abort its current job."""
    code = (
        "import signal, sys, time\n"
        "received = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: received.append(1))\n"
        "print('up', flush=True)\n"
        "while not received: time.sleep(0.01)\n"
        "time.sleep(1.5); sys.exit(10 + len(received))"
    )
    child = start(tmp_path, code)
    wait_until(lambda: last_line(child.log) == "up")
    child.terminate()
    time.sleep(0.5)
    child.terminate()
    child.stop(30, lambda: False)
    assert child.exit_code == 11


def test_children_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher_code = f"""
import os, sys, time
from pathlib import Path
from deploy.local.child_process import Child
code = "import time; print('up', flush=True); time.sleep(600)"
folder = Path({str(tmp_path)!r})
child = Child("test", [sys.executable, "-c", code],
              log=folder / "test.log", cwd=folder, env=dict(os.environ))
print(child.pid, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen(
        [sys.executable, "-c", launcher_code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        wait_until(lambda: last_line(tmp_path / "test.log") == "up")
        assert is_alive(pid)
        launcher.kill()
    wait_until(lambda: not is_alive(pid))


def test_the_end_is_described_with_the_last_line_and_the_log(tmp_path: Path) -> None:
    child = start(
        tmp_path, "print('loading', flush=True); raise SystemExit('no model at models/none\\n\\n')"
    )
    wait_until(lambda: child.exit_code is not None)
    assert child.describe_end() == (
        f"the test ended with exit code 1: no model at models/none (log: {tmp_path / 'test.log'})"
    )
    child.stop(0, lambda: False)


def test_the_end_is_described_with_the_signal(tmp_path: Path) -> None:
    child = start(tmp_path, "import os; os.abort()")
    wait_until(lambda: child.exit_code is not None)
    assert child.describe_end().startswith("the test was killed by SIGABRT")
    child.stop(0, lambda: False)
