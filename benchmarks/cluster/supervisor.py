"""Start the processes of all hosts, and restart each that ends, as a process manager does."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.child_process import MARK, Child, marked_processes
from deploy.local.stack import ROOT


class Supervisor:
    """A context manager; at its end all processes are killed, the last one started first."""

    def __init__(self, folder: Path) -> None:
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True)
        self._mark = uuid.uuid4().hex
        self._commands: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {}
        self._children: dict[str, Child] = {}
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._restart_what_ends, daemon=True)
        self.restarts = 0

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for child in reversed(self._children.values()):
            child.stop(0, lambda: True)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a process; `environment` is what it gets besides this process' own."""
        with self._lock:
            self._commands[name] = (command, environment or {})
            self._start(name)

    def kill(self, name: str) -> None:
        """Kill a process; `hold` it before, or it is restarted at once."""
        with self._lock:
            os.killpg(self._children[name].pid, 9)

    def restart(self, name: str, grace_s: float = 30) -> float:
        """Stop a process as a rollout does, and start it again; return how long it took to end."""
        started = time.monotonic()
        self.hold(name)
        self._children[name].stop(grace_s, lambda: False)
        took = time.monotonic() - started
        self.release(name)  # the thread starts it
        return took

    def hold(self, name: str) -> None:
        """Do not restart a process until `release`."""
        self._held.add(name)

    def release(self, name: str) -> None:
        """Restart a process again when it ends, or has ended."""
        self._held.discard(name)

    def pids(self) -> dict[int, str]:
        """Return the names of the processes, by process id."""
        with self._lock:
            return {child.pid: name for name, child in self._children.items()}

    def orphans(self) -> dict[int, str]:
        """Return the processes that still run, by process id."""
        return marked_processes(self._mark)

    def logs(self) -> str:
        """Return the last lines of every log, for an error message."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self._logs.iterdir())
        )

    def log(self, name: str) -> str:
        """Return the log of one process."""
        return (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _start(self, name: str) -> None:
        command, environment = self._commands[name]
        self._children[name] = Child(
            name,
            command,
            log=self._logs / f"{name}.log",
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", MARK: self._mark, **environment},
        )

    def _restart_what_ends(self) -> None:
        while not self._ending.wait(0.1):
            with self._lock:
                for name, child in list(self._children.items()):
                    if child.exit_code is None or name in self._held:
                        continue
                    child.stop(0, lambda: True)  # kills its descendants
                    self.restarts += 1
                    self._start(name)
