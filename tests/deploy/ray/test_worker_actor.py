"""Test the actor without Ray, in a process of its own: its worker starts, drains, dies with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from deploy.local.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import json, sys
from pathlib import Path
from deploy.ray import worker_actor

worker_actor.PAUSE_S = 0.2
actor = worker_actor.WorkerActor(
    "worker-0", ["python", "-c", sys.argv[1]], sys.argv[2], {"GREETING": "hello"},
    Path("deploy/local/parent_death.py").read_text(),
)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print("=" + json.dumps(getattr(actor, name)(*arguments)), flush=True)
"""
SERVING = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.environ["GREETING"], os.getcwd())
open(os.environ["WORKER_READY_FILE"], "w").close()
while True:
    time.sleep(0.05)
"""
STUBBORN = SERVING.replace("lambda *_: sys.exit(7)", "signal.SIG_IGN")


class Holder:
    """A process with one actor, as Ray has it; it is called through pipes."""

    def __init__(self, worker: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, textwrap.dedent(worker), str(folder)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, name: str, *arguments: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("="):
                found: dict[str, Any] = json.loads(line[1:])
                return found
        raise AssertionError("the actor is gone")

    def wait_until_ready(self) -> dict[str, Any]:
        wait_until(lambda: self.call("status")["state"] == "ready", 20, every_s=0.05)
        return self.call("status")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    holder = Holder(request.param, tmp_path)
    yield holder
    holder.close()


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize("held", [SERVING], indirect=True)
def test_a_worker_runs_with_its_environment_and_dies_with_the_actor(
    held: Holder, tmp_path: Path
) -> None:
    status = held.wait_until_ready()
    wait_until(lambda: held.call("status")["lines"] == [f"hello {tmp_path}"], 10)
    assert status["ends"] == []
    os.kill(held.process.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(status["pid"]), 10)


@pytest.mark.parametrize("held", [SERVING], indirect=True)
def test_a_drained_worker_ends_by_itself_and_the_actor_stays(held: Holder) -> None:
    held.wait_until_ready()
    status = held.call("drain", 30)
    assert status["state"] == "ended"
    assert [each["how"] for each in status["ends"]] == ["ended with status 7"]
    assert is_gone(status["pid"])
    assert held.process.poll() is None


@pytest.mark.parametrize("held", [STUBBORN], indirect=True)
def test_a_worker_that_does_not_end_is_killed(held: Holder) -> None:
    held.wait_until_ready()
    status = held.call("drain", 0.3)
    assert [each["how"] for each in status["ends"]] == ["was killed by SIGKILL"]
    assert is_gone(status["pid"])


def test_a_worker_that_ends_takes_the_actor_along_and_the_next_one_knows(tmp_path: Path) -> None:
    first = Holder("print('no card'); raise SystemExit(83)", tmp_path)
    assert first.process.wait(20) == 1, "Ray takes that for a crash, and starts the actor again"
    first.close()
    second = Holder(SERVING, tmp_path)
    try:
        (end,) = second.wait_until_ready()["ends"]
        assert (end["how"], end["line"]) == ("ended with status 83", "no card")
    finally:
        second.close()
