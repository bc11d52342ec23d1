"""The whole system on this machine: Valkey, one worker, the service; started, watched, stopped.

Everything it writes lies in one folder: `valkey/` (the data), `artifacts/` (the videos) and
`logs/`. What happens over HTTP once it is up is `client.py`'s business.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from deploy.local import client, valkey
from deploy.local.child_process import Child
from deploy.local.errors import LocalError
from deploy.local.ports import LOOPBACK
from deploy.local.signals import Signals

ROOT = Path(__file__).resolve().parents[2]
WORKER_CONFIG = ROOT / "deploy" / "wan-mini.toml"

_POLL_S = 0.1
_VALKEY_START_S = 60.0  # reading a large append-only file back takes its time
_READY_S = 600.0  # as long as a slow disk may need for a model
_GRACE_S = {"service": 5.0, "valkey": 10.0}  # the worker's: StackConfig.worker_grace_s
_RESTARTS = 3
_RESTART_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class StackConfig:
    """Where the stack lives: its folder, its ports on the loopback address, the worker's TOML.

    `worker_grace_s` is how long the worker may take to finish the job in hand when the stack stops.
    """

    folder: Path
    service_port: int
    valkey_port: int
    worker_config: Path
    worker_grace_s: float = 10.0

    @property
    def service_url(self) -> str:
        return f"http://{LOOPBACK}:{self.service_port}"

    @property
    def redis_url(self) -> str:
        return f"redis://{LOOPBACK}:{self.valkey_port}/0"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def environment(self) -> dict[str, str]:
        """The children's environment: the caller's, pointed at this stack."""
        ours = {
            "REDIS_URL": self.redis_url,
            "ARTIFACTS_URL": (self.folder / "artifacts").as_uri(),
            "SERVICE_HOST": LOOPBACK,
            "SERVICE_PORT": str(self.service_port),
            "PYTHONUNBUFFERED": "1",  # so that a log holds the last words of a killed process
        }
        inherited = {k: v for k, v in os.environ.items() if k != "SERVICE_PUBLIC_URL"}
        return inherited | ours


class Stack:
    """The three processes. Call `stop` in a finally: it ends whatever `start` got to."""

    def __init__(self, config: StackConfig, signals: Signals) -> None:
        self.config = config
        self._signals = signals
        self._children: dict[str, Child] = {}
        self._restarts: list[float] = []
        self._lock_file: int | None = None
        self._started_at = datetime.now(UTC)

    def start(self) -> None:
        """Returns when the service says that it and a worker are ready.

        Raises LocalError when something does not start, Interrupted when a signal asked to end.
        """
        self._prepare_folder()
        self._start("valkey")
        self._wait("valkey", self._valkey_answers, _VALKEY_START_S)
        self._start("worker")
        self._start("service")
        self._wait("service and worker", self._is_ready, _READY_S)

    def check(self) -> None:
        """Raises when a signal asked to end or a process has ended by itself."""
        self._signals.raise_if_asked()
        for child in self._children.values():
            if child.exit_code is not None:
                raise LocalError(child.obituary())

    def keep_running(self, tell: Callable[[str], None]) -> None:
        """Watches until a signal; starts an ended worker again, as a process manager would.

        Raises LocalError when Valkey or the service ends, or the worker ends again and again.
        """
        while True:
            worker = self._children["worker"]
            if worker.exit_code is not None:
                self._count_restart(worker)
                tell(f"{worker.obituary()}; starting it again")
                worker.end(0, self._signals.in_a_hurry)
                self._start("worker")
            self.check()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends what runs: the service and the worker together, then Valkey.

        The worker finishes the job in hand first; Valkey stays up for it to report to. A worker
        that is killed instead, after its grace or in a hurry, leaves the job in Valkey's file, and
        the next worker on the same folder runs it again.
        """
        grace_s = _GRACE_S | {"worker": self.config.worker_grace_s}
        for name in ("service", "worker"):
            if name in self._children:
                self._children[name].ask_to_end()
        for name in ("service", "worker", "valkey"):
            if name in self._children:
                self._children.pop(name).end(grace_s[name], self._signals.in_a_hurry)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _prepare_folder(self) -> None:
        if not self.config.worker_config.is_file():
            raise LocalError(f"there is no worker configuration at {self.config.worker_config}")
        for name in ("valkey", "artifacts", "logs"):
            (self.config.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock_file = os.open(self.config.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"another demo runs on {self.config.folder}: stop that one first"
            ) from None
        for log in self.config.logs.glob("*.log"):
            log.unlink()

    def _start(self, name: str) -> None:
        commands = {
            "valkey": lambda: valkey.server_command(
                self.config.folder / "valkey", self.config.valkey_port
            ),
            "worker": lambda: [
                *(sys.executable, "-m", "worker"),
                *("--config", str(self.config.worker_config.resolve())),
            ],
            "service": lambda: [sys.executable, "-m", "service"],
        }
        self._signals.raise_if_asked()
        self._children[name] = Child(
            name,
            commands[name](),
            log=self.config.logs / f"{name}.log",
            cwd=ROOT,
            env=self.config.environment(),
        )

    def _wait(self, what: str, ready: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise LocalError(
                    f"{what} not ready after {limit_s:.0f} s: see the logs in {self.config.logs}"
                )
            time.sleep(_POLL_S)
        self.check()

    def _valkey_answers(self) -> bool:
        return valkey.answers(self.config.valkey_port)

    def _is_ready(self) -> bool:
        """Whether the service is, and lists a worker of this start.

        The offer of a worker that was killed moments before, in an earlier run, still lives then.
        """
        try:
            with client.connect(self.config.service_url) as service:
                if service.get("/readyz").is_error:
                    return False
                answer = service.get("/models")
        except httpx.TransportError:
            return False
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise LocalError(f"this stack has API keys: put one into {client.KEY_VARIABLE}")
        if answer.is_error:
            return False
        starts = [
            worker["started_at"] for model in answer.json()["models"] for worker in model["workers"]
        ]
        return any(datetime.fromisoformat(start) >= self._started_at for start in starts)

    def _count_restart(self, worker: Child) -> None:
        now = time.monotonic()
        self._restarts = [t for t in self._restarts if now - t < _RESTART_WINDOW_S] + [now]
        if len(self._restarts) > _RESTARTS:
            raise LocalError(
                f"{worker.obituary()}, as the {_RESTARTS} started within the last "
                f"{_RESTART_WINDOW_S:.0f} s did"
            )
