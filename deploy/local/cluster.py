"""Run several workers and API processes with one Valkey, and restart each process that ends.

It does what a process manager does in production, so that tests and benchmarks can cause real
faults and recoveries. Everything runs on loopback and in one folder. Every process has a mark in
its environment, by which orphans are found.
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
from deploy.local.child_process import MARK, Child, marked_processes
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until

WORKER = (sys.executable, "-m", "worker")
ENDED = ("succeeded", "failed", "cancelled")


class Cluster:
    """A context manager: all processes are ready inside the block, and stopped after it."""

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = 2,
        workers: int = 2,
        worker: Sequence[str] = WORKER,
        environment: Mapping[str, str] | None = None,
        own_environments: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Prepare the processes.

        Args:
            environment: what all processes get besides the addresses.
            own_environments: what single processes get besides that, by their names.
        """
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
                "SERVICE_STATE_DIR": str(folder / "state"),
                "OMP_WAIT_POLICY": "passive",
                "PYTHONUNBUFFERED": "1",
                "WORKER_DEVICE": "cpu",
                "WORKER_THREADS": "1",
                MARK: self.mark,
            }
            | dict(environment or {})
        )
        self._own_environments = own_environments or {}
        self._trees: dict[str, Path] = {}
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
        self._not_restarted: set[str] = set()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._request_numbers = itertools.count()
        self.redis = Redis(port=self.valkey_port, socket_timeout=5)
        # One client for all requests: setting up TLS for each would take 45 ms of a core, which
        # frequent polls would take from the workers.
        self._client = httpx.Client(timeout=10)

    @property
    def urls(self) -> list[str]:
        """The base URLs of the API processes."""
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
        """Stop all processes: first workers and API processes, then Valkey."""
        self._stopping.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()
        ordered = sorted(self.children.items(), key=lambda each: each[0] == "valkey")
        for _, child in ordered:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGCONT)
            child.terminate()
        for _, child in ordered:
            child.stop(15, lambda: False)
        self.redis.close()
        self._client.close()

    def orphans(self) -> dict[int, str]:
        """Return the processes of this cluster that still run, by pid."""
        return marked_processes(self.mark)

    def kill(self, name: str, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process by name; it is restarted if it ends."""
        os.kill(self.children[name].pid, signal_number)

    def add_options(self, name: str, *options: str) -> None:
        """Add options to the command of a process, from its next start on."""
        self._commands[name] = [*self._commands[name], *options]

    def set_tree(self, name: str, tree: Path) -> None:
        """Let a process run the code in this folder and not this one, from its next start on."""
        self._trees[name] = tree

    def pause_restarts(self, *names: str) -> None:
        """Do not restart these processes until `resume_restarts`."""
        self._not_restarted.update(names)

    def resume_restarts(self, *names: str) -> None:
        """Restart these processes again when they end."""
        self._not_restarted.difference_update(names)

    def name_of(self, worker_id: str | None) -> str | None:
        """Return the name of the live process with this worker id, looked up in RQ's registry."""
        pid = self.redis.hget(f"rq:worker:{worker_id}", "pid")
        children = self.children.items()
        return next((name for name, child in children if pid and child.pid == int(pid)), None)

    def pids(self, kind: str) -> dict[str, int]:
        """Return the pids of the processes whose names begin with `kind`, by name."""
        return {n: child.pid for n, child in self.children.items() if n.startswith(kind)}

    def wait_until_ready(self, limit_s: float = 120) -> None:
        """Wait until every API process is ready and every worker is live."""
        workers = sum(name.startswith("worker") for name in self._commands)

        def ready() -> bool:
            for url in self.urls:
                try:
                    response = self._client.get(f"{url}/readyz")
                except httpx.TransportError:
                    return False
                if response.status_code != 200 or response.json()["workers"] < workers:
                    return False
            return True

        wait_until(ready, limit_s, "everything is ready", self.logs)

    def request(
        self, method: str, path: str, *, limit_s: float = 60, **options: Any
    ) -> httpx.Response:
        """Send a request to one API process after another, until one responds with other than 503.

        As it may be sent more than once, a POST needs an Idempotency-Key.
        """
        deadline = time.monotonic() + limit_s
        while True:
            url = self.urls[next(self._request_numbers) % len(self.urls)]
            try:
                response = self._client.request(method, url + path, **options)
                if response.status_code != 503:
                    return response
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"no response to {method} {path}\n{self.logs()}"
            time.sleep(0.1)

    def submit(self, **body: object) -> str:
        """Submit a request for a video; return the id of the accepted job."""
        key = uuid.uuid4().hex
        response = self.request("POST", "/generate", json=body, headers={"Idempotency-Key": key})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Return the JSON of `GET /jobs/{id}`."""
        response = self.request("GET", f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def record(self, job_id: str) -> dict[str, str]:
        """Return the fields of the job's hash, including those that the API does not show."""
        found: Any = self.redis.hgetall(f"wan:job:{job_id}")
        return {name.decode(): value.decode() for name, value in found.items()}

    def wait_for_step(self, job_id: str, step: int, limit_s: float = 60) -> str:
        """Wait until the job has done `step` denoising steps; return its worker's process name."""
        found: list[str] = []

        def reached() -> bool:
            job = self.job(job_id)
            assert job["state"] in ("queued", "running"), job
            progress = job["progress"] or {"stage": "", "step": 0}
            if progress["stage"] != "denoise" or progress["step"] < step:
                return False
            worker = self.name_of(self.record(job_id).get("worker"))
            found.extend([worker] if worker else [])
            return worker is not None

        wait_until(reached, limit_s, f"job {job_id} is at step {step}", self.logs)
        return found[-1]

    def wait_for_end(self, job_id: str, limit_s: float = 120) -> dict[str, Any]:
        """Wait until the job has ended; return its JSON."""
        wait_until(
            lambda: self.job(job_id)["state"] in ENDED, limit_s, f"job {job_id} ends", self.logs
        )
        return self.job(job_id)

    def end_states(self, job_id: str) -> list[str]:
        """Return every final state in the job's event stream; there should be one."""
        entries: Any = self.redis.xrange(f"wan:events:{job_id}")
        states = [fields[b"state"].decode() for _, fields in entries]
        return [state for state in states if state in ENDED]

    def logs(self) -> str:
        """Return the last lines of every process' log, for an error message."""
        texts = []
        for path in sorted((self.folder / "logs").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            texts += [f"--- {path.name}", *lines]
        return "\n".join(texts)

    def _start(self, name: str) -> None:
        port = self._ports.get(name)
        own = dict(self._own_environments.get(name, {}))
        own |= {} if port is None else {"SERVICE_PORT": str(port)}
        self.children[name] = Child(
            name,
            self._commands[name],
            log=self.folder / "logs" / f"{name}.log",
            cwd=self._trees.get(name, ROOT),
            env=self.environment | own,
        )

    def _supervise(self) -> None:
        while not self._stopping.wait(0.1):
            for name, child in list(self.children.items()):
                if child.exit_code is None or name in self._not_restarted:
                    continue
                child.stop(0, lambda: True)  # kills its descendants
                with self._lock:
                    self.restarts += 1
                self._start(name)
