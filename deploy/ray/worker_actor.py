"""Hold one worker process on the cards that Ray has given to this actor.

Ray sends this module to its nodes by value: it needs nothing but Python there, and the worker runs
with whatever interpreter and folder it was told. Ray places the actor and starts it again when its
process or its node is gone. The worker's end ends the actor's process, too, so that each restart is
Ray's. Jobs are no matter of Ray: a worker takes them from Redis, and when it dies the lease of its
job expires there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

SOON_S = 30.0
"""A worker that ends sooner than this is not started again at once: something is set up wrong."""

PAUSE_S = 10.0
"""How long its actor then waits before it lets Ray start it again."""

LINES = 20
"""How many of the worker's last lines `status` shows; Ray keeps all of them in the actor's log."""


MARK = "WAN_RAY_ACTOR"
"""The variable by which an actor finds each process of its worker, whatever session it leads."""


class WorkerActor:
    """One worker process; made by Ray, which calls the public methods in threads."""

    def __init__(
        self,
        namespace: str,
        name: str,
        command: Sequence[str],
        folder: str,
        environment: Mapping[str, str],
        parent_death: str,
    ) -> None:
        """Start the worker.

        Args:
            namespace: where `name` is unique; a node may have workers of several.
            command: its arguments; "python" as the first is the interpreter of this actor.
            folder: its working directory; it has to be on every node.
            environment: what it gets besides the environment of this node's Ray.
            parent_death: the text of deploy/local/parent_death.py, by which it dies with the actor.
        """
        self._name = name
        # Of this user alone, because another one's folder cannot be written to.
        ours = Path(tempfile.gettempdir()) / f"wan-hif8-ray-{os.getuid()}"
        self._memory = ours / quote(namespace, safe="")
        ours.mkdir(mode=0o700, exist_ok=True)
        self._memory.mkdir(exist_ok=True)
        self._ends = self._memory / f"{name}.ends"
        self._ready = self._memory / f"{name}.ready"
        self._ready.unlink(missing_ok=True)
        python = sys.executable if command[0] == "python" else command[0]
        self._command = [python, "-c", parent_death, str(os.getpid()), python, *command[1:]]
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self._environment = {
            **_environment_of_node(),
            "PYTHONUNBUFFERED": "1",
            "WORKER_READY_FILE": str(self._ready),
            **environment,
            MARK: self._mark,
        }
        self._lines: deque[str] = deque(maxlen=LINES)
        self._started = time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._is_started = threading.Event()
        self._is_draining = False
        self._is_ended = threading.Event()
        # The worker dies with the thread that started it, so this one stays as long as it runs.
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """Return what there is to know about this worker; all of it can be sent as JSON."""
        process = self._process
        return {
            "name": self._name,
            "state": self._state(),
            "pid": None if process is None else process.pid,
            "node": _node(),
            "cards": self._cards(),
            "seconds": round(time.monotonic() - self._started, 1),
            "lines": list(self._lines),
            "ends": self._earlier_ends(),
        }

    def drain(self, grace_s: float) -> dict[str, Any]:
        """Have the worker end as WORKER_DRAIN says; kill it if it takes longer than `grace_s`.

        The job of a killed worker is given to another when its lease expires.
        """
        self._is_draining = True
        self._is_started.wait()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            if not self._is_ended.wait(grace_s):
                self._kill(process)
                self._is_ended.wait(10)
        return self.status()

    def _state(self) -> str:
        if self._is_ended.is_set():
            return "ended"
        if self._is_draining:
            return "draining"
        return "ready" if self._ready.exists() else "starting"

    def _cards(self) -> str:
        names = ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
        return next((os.environ[name] for name in names if os.environ.get(name)), "")

    def _run(self) -> None:
        status = self._run_worker()
        self._remember(status)
        self._is_ended.set()
        if self._is_draining:
            return
        if time.monotonic() - self._started < SOON_S:
            time.sleep(PAUSE_S)
        if not self._is_draining:
            os._exit(1)  # to Ray a crash of this actor, which it starts again

    def _run_worker(self) -> str:
        """Run the worker; return how it ended."""
        try:
            process = self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return f"was not started: {error}"
        finally:
            self._is_started.set()
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        code = process.wait()
        self._kill(process)  # whatever it has left behind, which would keep the pipe open
        reader.join(5)
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            self._lines.append(line.rstrip())
            print(line, end="", flush=True)  # Ray writes it into the actor's log

    def _kill(self, process: subprocess.Popen[str]) -> None:
        """Kill the worker with all its descendants: each rank of torchrun leads its own session."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed: set[int] = set()
        # Again, until there is none that one of the others has started meanwhile.
        while found := _marked_processes(self._mark) - killed:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= found

    def _remember(self, how: str) -> None:
        """Note the end in a file of this node, for the actor that Ray makes next."""
        said = next((line for line in reversed(self._lines) if line.strip()), "")
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(f"the worker {self._name} {how}", flush=True)
        with self._ends.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": at, "how": how, "line": said}) + "\n")

    def _earlier_ends(self) -> list[dict[str, str]]:
        """Return the latest ends on this node, the last one last."""
        try:
            lines = self._ends.read_text(encoding="utf-8").splitlines()[-5:]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]


def _environment_of_node() -> dict[str, str]:
    """Return the environment of this actor, which is that of the node's Ray.

    Some versions of Ray hide all cards from an actor that asked for none under Ray's own names
    (CUDA_VISIBLE_DEVICES and the like, empty); a worker with another name for its cards needs them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if value or not name.endswith("_VISIBLE_DEVICES")
    }


def _marked_processes(mark: str) -> set[int]:
    """Return the live processes that have inherited a mark, whoever their parent is now."""
    sought = f"{MARK}={mark}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or belongs to another user
            if sought in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def _node() -> str:
    """Return the address of this node, as Ray knows it."""
    ray = sys.modules.get("ray")
    return os.uname().nodename if ray is None else str(ray.util.get_node_ip_address())
