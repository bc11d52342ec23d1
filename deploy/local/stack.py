"""Start, supervise and stop the whole system on this machine: Valkey, one worker, the service.

It writes everything into one folder: `valkey/` (the data), `artifacts/` (the videos) and `logs/`.
`client.py` sends requests to it.
"""

import fcntl
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
_VALKEY_START_S = 60.0  # it may have to load a large append-only file
_READY_S = 600.0  # a slow disk may need this long to load a model
_GRACE_S = {"service": 5.0, "valkey": 10.0}  # for the worker: StackConfig.worker_grace_s
_EVERY_ADDRESS = ("0.0.0.0", "::")
_RESTARTS = 3
_RESTART_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class StackConfig:
    """The configuration of a stack: its folder, its ports on loopback, the worker's TOML file.

    `worker_grace_s` is how long the worker may take to finish its current job when the stack stops.
    `password` is Valkey's; every start has another one.
    `host` is where the service listens. A `private` stack serves its own launcher only: it has no
    public address and calls no webhooks, whatever the environment says. `worker` is the command
    that starts a worker, without its configuration.
    """

    folder: Path
    service_port: int
    valkey_port: int
    worker_config: Path
    worker_grace_s: float = 10.0
    host: str = LOOPBACK
    private: bool = False
    worker: tuple[str, ...] = (sys.executable, "-m", "worker")
    password: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def service_url(self) -> str:
        """The service's base URL, as this machine reaches it."""
        host = LOOPBACK if self.host in _EVERY_ADDRESS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.service_port}"

    @property
    def redis_url(self) -> str:
        """The URL of Valkey's database, with its password."""
        return f"redis://:{self.password}@{LOOPBACK}:{self.valkey_port}/0"

    @property
    def logs(self) -> Path:
        """The folder of the log files."""
        return self.folder / "logs"

    def environment(self) -> dict[str, str]:
        """Return the children's environment: this process' own, with the settings of this stack.

        Only where the data are, and where the service listens, is the stack's own to say.
        """
        settings = {
            "REDIS_URL": self.redis_url,
            "ARTIFACTS_URL": (self.folder / "artifacts").as_uri(),
            "SERVICE_HOST": self.host,
            "SERVICE_PORT": str(self.service_port),
            "PYTHONUNBUFFERED": "1",  # so that logs contain the last output of a killed process
        }
        inherited = {"SERVICE_STATE_DIR": str(self.folder / "state")} | os.environ
        if self.private:
            # A link to another address would not lead to this stack's video.
            outward = ("SERVICE_PUBLIC_URL", "SERVICE_WEBHOOK_")
            inherited = {k: v for k, v in inherited.items() if not k.startswith(outward)}
        elif inherited.get("SERVICE_WEBHOOK_HOSTS") and not inherited.get("SERVICE_PUBLIC_URL"):
            settings["SERVICE_PUBLIC_URL"] = self.service_url  # webhooks need to be told
        return inherited | settings


class Stack:
    """The three processes. Call `stop` in a `finally`: it stops whatever `start` has started."""

    def __init__(
        self, config: StackConfig, signals: Signals, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._signals = signals
        self._clock = clock
        self._children: dict[str, Child] = {}
        self._restarts: list[float] = []
        self._lock_file: int | None = None
        self._started_at = datetime.now(UTC)

    def start(self) -> None:
        """Start all processes; return when the service and a worker are ready.

        Raises:
            LocalError: a process does not start.
            Interrupted: a signal was received.
        """
        self._prepare_folder()
        self._start("valkey")
        self._wait("valkey", self._is_valkey_ready, _VALKEY_START_S)
        self._start("worker")
        self._start("service")
        self._wait("service and worker", self._is_ready, _READY_S)

    def check(self) -> None:
        """Raise Interrupted if a signal was received, and LocalError if a process has ended."""
        self._signals.raise_if_interrupted()
        for child in self._children.values():
            if child.exit_code is not None:
                raise LocalError(child.describe_end())

    def supervise(self, report: Callable[[str], None]) -> None:
        """Run until a signal is received, and restart the worker if it ends.

        Args:
            report: called with a sentence when the worker has ended.

        Raises:
            LocalError: Valkey or the service has ended, or the worker ends too often.
            Interrupted: a signal was received.
        """
        while True:
            worker = self._children["worker"]
            if worker.exit_code is not None:
                self._count_restart(worker)
                report(f"{worker.describe_end()}; starting it again")
                worker.stop(0, self._signals.is_forced)
                self._start("worker")
            self.check()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop all processes: the service and the worker at the same time, then Valkey.

        The worker finishes its current job first, and needs Valkey to report its end. If the worker
        is killed instead, after the grace period or by a second signal, the job stays in Valkey's
        file, and the next worker on the same folder runs it again.
        """
        grace_s = _GRACE_S | {"worker": self.config.worker_grace_s}
        for name in ("service", "worker"):
            if name in self._children:
                self._children[name].terminate()
        for name in ("service", "worker", "valkey"):
            if name in self._children:
                self._children.pop(name).stop(grace_s[name], self._signals.is_forced)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _prepare_folder(self) -> None:
        if not self.config.worker_config.is_file():
            raise LocalError(f"there is no worker configuration at {self.config.worker_config}")
        for name in ("valkey", "artifacts", "logs"):
            (self.config.folder / name).mkdir(parents=True, exist_ok=True)
        valkey.make_private(self.config.folder / "valkey")
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
                self.config.folder / "valkey", self.config.valkey_port, self.config.password
            ),
            "worker": lambda: [
                *self.config.worker,
                *("--config", str(self.config.worker_config.resolve())),
            ],
            "service": lambda: [sys.executable, "-m", "service"],
        }
        self._signals.raise_if_interrupted()
        self._children[name] = Child(
            name,
            commands[name](),
            log=self.config.logs / f"{name}.log",
            cwd=ROOT,
            env=self.config.environment(),
            umask=valkey.UMASK if name == "valkey" else -1,
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

    def _is_valkey_ready(self) -> bool:
        return valkey.answers(self.config.valkey_port, self.config.password)

    def _is_ready(self) -> bool:
        """Return whether the service is ready and lists a worker of this start.

        The offer of a worker that was killed shortly before, in an earlier run, may still be live.
        """
        try:
            with client.connect(self.config.service_url) as service:
                if service.get("/readyz").is_error:
                    return False
                response = service.get("/models")
        except httpx.TransportError:
            return False
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise LocalError(f"this stack has API keys: put one into {client.KEY_VARIABLE}")
        if response.is_error:
            return False
        starts = [
            worker["started_at"]
            for model in response.json()["models"]
            for worker in model["workers"]
        ]
        return any(datetime.fromisoformat(start) >= self._started_at for start in starts)

    def _count_restart(self, worker: Child) -> None:
        now = self._clock()
        self._restarts = [t for t in self._restarts if now - t < _RESTART_WINDOW_S] + [now]
        if len(self._restarts) > _RESTARTS:
            raise LocalError(
                f"{worker.describe_end()}, as the {_RESTARTS} started within the last "
                f"{_RESTART_WINDOW_S:.0f} s did"
            )
