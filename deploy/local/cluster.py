"""Several workers and API processes over one Valkey, each started again whenever it ends.

What a process manager does in production, so that faults can be made and recovered from for real.
Everything runs on loopback, in one folder, and carries a mark by which an orphan would be found.
"""

import itertools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from redis import Redis

from deploy.local import valkey
from deploy.local.child_process import Child
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.waiting import wait_until
from tests.support.launcher import MARK, ROOT, marked_processes

WORKER = (sys.executable, "-m", "worker")
ENDED = ("succeeded", "failed", "cancelled")


class Cluster:
    """A context: entered, everything is up and ready; left, nothing is left."""

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = 2,
        workers: int = 2,
        worker: Sequence[str] = WORKER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.valkey_port = find_free_port()
        self.artifacts = folder / "artifacts"
        for each in (self.artifacts, folder / "valkey", folder / "logs"):
            each.mkdir(parents=True, exist_ok=True)
        self.environment = (
            {k: v for k, v in os.environ.items() if not k.startswith(("SERVICE_", "WORKER_"))}
            | {
                "REDIS_URL": f"redis://{LOOPBACK}:{self.valkey_port}/0",
                "ARTIFACTS_URL": self.artifacts.as_uri(),
                "OMP_WAIT_POLICY": "passive",
                "PYTHONUNBUFFERED": "1",
                "WORKER_DEVICE": "cpu",
                "WORKER_THREADS": "1",
                MARK: self.mark,
            }
            | dict(environment or {})
        )
        self._commands: dict[str, Sequence[str]] = {
            "valkey": valkey.server_command(folder / "valkey", self.valkey_port)
        }
        self._ports = {f"api-{number}": find_free_port() for number in range(apis)}
        for name in self._ports:
            self._commands[name] = (sys.executable, "-m", "service")
        for number in range(workers):
            self._commands[f"worker-{number}"] = worker
        self.children: dict[str, Child] = {}
        self.restarts = 0
        self._held: set[str] = set()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._turn = itertools.count()
        self.redis = Redis(port=self.valkey_port, socket_timeout=5)
        # One for all requests: making ready for TLS alone takes a client 45 ms of a core, which
        # whoever asks for a job's state again and again would take from the workers.
        self._client = httpx.Client(timeout=10)

    @property
    def urls(self) -> list[str]:
        return [f"http://{LOOPBACK}:{port}" for port in self._ports.values()]

    def __enter__(self) -> "Cluster":
        try:
            for name in self._commands:
                self._start(name)
                if name == "valkey":
                    wait_until(lambda: valkey.answers(self.valkey_port), 30, "Valkey answers")
            self._supervisor.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends everything: workers and API processes in order, then Valkey."""
        self._ending.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()
        ordered = sorted(self.children.items(), key=lambda each: each[0] == "valkey")
        for _, child in ordered:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGCONT)
            child.ask_to_end()
        for _, child in ordered:
            child.end(15, lambda: False)
        self.redis.close()
        self._client.close()

    def orphans(self) -> dict[int, str]:
        """Processes of this cluster that still live, by pid."""
        return marked_processes(self.mark)

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process by name; one that ends is started again."""
        os.kill(self.children[name].pid, how)

    def hold(self, *names: str) -> None:
        """Do not start these again until `resume`."""
        self._held.update(names)

    def resume(self, *names: str) -> None:
        self._held.difference_update(names)

    def worker_of(self, worker_id: str | None) -> str | None:
        """The name of the live process that runs as `worker_id`, through RQ's entry of it."""
        pid = self.redis.hget(f"rq:worker:{worker_id}", "pid")
        children = self.children.items()
        return next((name for name, child in children if pid and child.pid == int(pid)), None)

    def pids(self, kind: str) -> dict[str, int]:
        return {n: child.pid for n, child in self.children.items() if n.startswith(kind)}

    def wait_until_ready(self, limit_s: float = 120) -> None:
        """Until every API process says that it is ready, and every worker is live."""
        workers = sum(name.startswith("worker") for name in self._commands)

        def ready() -> bool:
            for url in self.urls:
                try:
                    answer = self._client.get(f"{url}/readyz")
                except httpx.TransportError:
                    return False
                if answer.status_code != 200 or answer.json()["workers"] < workers:
                    return False
            return True

        wait_until(ready, limit_s, "everything is ready", self.logs)

    def request(
        self, method: str, path: str, *, limit_s: float = 60, **more: Any
    ) -> httpx.Response:
        """Ask one API process after the other, until one answers with anything but 503.

        As a careful client would: a request that is sent again carries an Idempotency-Key.
        """
        deadline = time.monotonic() + limit_s
        while True:
            url = self.urls[next(self._turn) % len(self.urls)]
            try:
                answer = self._client.request(method, url + path, **more)
                if answer.status_code != 503:
                    return answer
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"no answer to {method} {path}\n{self.logs()}"
            time.sleep(0.1)

    def submit(self, **body: object) -> str:
        """Ask for a video; returns the id of the accepted job."""
        key = uuid.uuid4().hex
        answer = self.request("POST", "/generate", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.request("GET", f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def record(self, job_id: str) -> dict[str, str]:
        """The raw record, for what callers do not see."""
        found: Any = self.redis.hgetall(f"wan:job:{job_id}")
        return {name.decode(): value.decode() for name, value in found.items()}

    def wait_for_step(self, job_id: str, step: int, limit_s: float = 60) -> str:
        """Until the job has done `step` denoising steps; returns its worker's process name."""
        found: list[str] = []

        def reached() -> bool:
            job = self.job(job_id)
            assert job["state"] in ("queued", "running"), job
            progress = job["progress"] or {"stage": "", "step": 0}
            if progress["stage"] != "denoise" or progress["step"] < step:
                return False
            worker = self.worker_of(self.record(job_id).get("worker"))
            found.extend([worker] if worker else [])
            return worker is not None

        wait_until(reached, limit_s, f"job {job_id} is at step {step}", self.logs)
        return found[-1]

    def wait_for_end(self, job_id: str, limit_s: float = 120) -> dict[str, Any]:
        wait_until(
            lambda: self.job(job_id)["state"] in ENDED, limit_s, f"job {job_id} ends", self.logs
        )
        return self.job(job_id)

    def ends(self, job_id: str) -> list[str]:
        """Every terminal state that the job's event stream has ever told."""
        entries: Any = self.redis.xrange(f"wan:events:{job_id}")
        states = [fields[b"state"].decode() for _, fields in entries]
        return [state for state in states if state in ENDED]

    def logs(self) -> str:
        """The last lines of every process, for the message of a failure."""
        texts = []
        for path in sorted((self.folder / "logs").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            texts += [f"--- {path.name}", *lines]
        return "\n".join(texts)

    def _start(self, name: str) -> None:
        port = self._ports.get(name)
        own = {} if port is None else {"SERVICE_PORT": str(port)}
        self.children[name] = Child(
            name,
            self._commands[name],
            log=self.folder / "logs" / f"{name}.log",
            cwd=ROOT,
            env=self.environment | own,
        )

    def _supervise(self) -> None:
        while not self._ending.wait(0.1):
            for name, child in list(self.children.items()):
                if child.exit_code is None or name in self._held:
                    continue
                child.end(0, lambda: True)  # and what it left running
                with self._lock:
                    self.restarts += 1
                self._start(name)
