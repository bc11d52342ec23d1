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
from tests.deploy.ray.process_tree import descendants_of, is_gone

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import json, sys
from pathlib import Path
from deploy.ray import worker_actor

worker_actor.PAUSE_S = 0.2
actor = worker_actor.WorkerActor(
    sys.argv[3], "worker-0", ["python", "-c", sys.argv[1]], sys.argv[2], {"GREETING": "hello"},
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
# As torchrun has its ranks: each leads a session of its own, and one starts a program itself.
GANG = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = "import subprocess as s, sys; s.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
ranks = [subprocess.Popen([sys.executable, "-c", rank], start_new_session=True) for _ in range(2)]
open(os.environ["WORKER_READY_FILE"], "w").close()
while True:
    time.sleep(0.05)
"""


class Holder:
    """A process with one actor, as Ray has it; it is called through pipes."""

    def __init__(
        self, worker: str, folder: Path, namespace: str = "ours", **variables: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, textwrap.dedent(worker), str(folder), namespace],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder), **variables},
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


@pytest.mark.parametrize("held", [GANG], indirect=True)
@pytest.mark.parametrize("killed_by", ["the actor", "somebody else"])
def test_no_rank_of_a_killed_worker_stays_on_its_cards(held: Holder, killed_by: str) -> None:
    torchrun = held.wait_until_ready()["pid"]
    wait_until(lambda: len(descendants_of(torchrun)) == 4, 20, every_s=0.05)
    ranks = descendants_of(torchrun)
    if killed_by == "the actor":
        assert held.call("drain", 0.3)["state"] == "ended"
    else:
        os.kill(torchrun, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, ranks)), 10)


def test_workers_of_two_namespaces_know_nothing_of_each_other(tmp_path: Path) -> None:
    ours = Holder(SERVING, tmp_path)
    # Where it is not escaped, this is the folder of the first.
    theirs = Holder("import time; time.sleep(60)", tmp_path, namespace="x/../ours")
    try:
        ours.wait_until_ready()
        assert theirs.call("status")["state"] == "starting"
        (folder,) = (each for each in tmp_path.iterdir() if each.name.startswith("wan-hif8-ray"))
        assert folder.name.endswith(f"-{os.getuid()}"), "another user has a folder of its own"
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        ours.close()
        theirs.close()


def test_a_worker_sees_the_cards_that_ray_hides_with_an_empty_variable(tmp_path: Path) -> None:
    code = "import os; print({k: v for k, v in os.environ.items() if k.endswith('_DEVICES')})"
    hidden = {"ASCEND_RT_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "3"}
    holder = Holder(f"{code}; import time; time.sleep(60)", tmp_path, **hidden)
    try:
        wait_until(lambda: holder.call("status")["lines"], 20, every_s=0.05)
        (line,) = holder.call("status")["lines"]
        assert line == "{'CUDA_VISIBLE_DEVICES': '3'}"
    finally:
        holder.close()
