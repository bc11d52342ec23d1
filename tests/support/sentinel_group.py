"""Run a primary, its replica and the sentinels that watch them, with passwords, with TLS if asked.

Valkey runs them, or Debian's Redis where TLS is wanted: the embedded Valkey is built without.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from benchmarks.fixtures.certificates import Authority
from deploy.local import valkey
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.waiting import wait_until

PASSWORD = "of the servers"
SENTINEL_PASSWORD = "of the sentinels"
NAME = "wan"
QUICK = {"down-after-milliseconds": 500, "failover-timeout": 3000}


def redis_server() -> str:
    """Return the program with TLS that `make test` installs (deploy/install/redis.sh)."""
    program = Path(sys.prefix) / "bin" / "redis-server"
    assert program.exists(), f"{program} is missing: run sh deploy/install/redis.sh {sys.prefix}"
    return str(program)


class SentinelGroup:
    """A context manager: the sentinels know the primary, its replica and each other inside."""

    def __init__(
        self, folder: Path, *, servers: int = 2, sentinels: int = 3, tls: Authority | None = None
    ) -> None:
        self._folder = folder
        self._authority = tls
        self._certificate = tls and tls.issue("server", LOOPBACK)
        self.ports = [find_free_port() for _ in range(servers)]
        self.sentinel_ports = [find_free_port() for _ in range(sentinels)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SentinelGroup:
        try:
            for port in self.ports:
                self._start_server(port)
            for port in self.sentinel_ports:
                self._start_sentinel(port)
            wait_until(self._is_settled, 30, "the sentinels know each other", every_s=0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def url(
        self, *, name: str = NAME, sentinel_password: str = SENTINEL_PASSWORD, query: str = ""
    ) -> str:
        """Return the REDIS_URL of the group."""
        scheme = "rediss" if self._authority else "redis"
        places = ",".join(f"{LOOPBACK}:{port}" for port in self.sentinel_ports)
        password = PASSWORD.replace(" ", "%20")
        options = f"sentinel_password={sentinel_password.replace(' ', '%20')}{query}"
        return f"{scheme}+sentinel://:{password}@{places}/{name}/0?{options}"

    def client(self, port: int, password: str = PASSWORD) -> Redis:
        """Return a client of one server or sentinel."""
        tls: dict[str, Any] = {}
        if self._authority is not None:
            tls = {"ssl": True, "ssl_ca_certs": str(self._authority.file)}
            tls["ssl_certfile"] = str(self._certificate)
        return Redis(host=LOOPBACK, port=port, password=password, socket_timeout=5, **tls)

    def primary(self) -> int:
        """Return the port of the server that the first sentinel calls the primary."""
        with self.client(self.sentinel_ports[0], SENTINEL_PASSWORD) as sentinel:
            return int(sentinel.sentinel_masters()[NAME]["port"])

    def replicas_in_step(self) -> bool:
        """Return whether every other server has what the primary has."""
        with self.client(self.primary()) as redis:
            redis.set("step", "1")
            return int(redis.wait(len(self.ports) - 1, 100)) == len(self.ports) - 1

    def kill(self, port: int) -> None:
        """Kill one server."""
        self._processes[port].kill()
        self._processes[port].wait()

    def _start_server(self, port: int) -> None:
        folder = self._folder / str(port)
        folder.mkdir()
        command = valkey.server_command(folder, port)
        options = ["--requirepass", PASSWORD, "--masterauth", PASSWORD]
        options += ["--repl-diskless-sync-delay", "0"]
        if port != self.ports[0]:
            options += ["--replicaof", LOOPBACK, str(self.ports[0])]
        if self._authority is not None:
            command[0] = redis_server()
            options += ["--port", "0"]
            for line in self._tls_lines(port):
                name, value = line.split(" ", 1)
                options += [f"--{name}", value]
        self._start(port, [*command, *options], PASSWORD)

    def _start_sentinel(self, port: int) -> None:
        place, quorum = f"{LOOPBACK} {self.ports[0]}", len(self.sentinel_ports) // 2 + 1
        lines = [
            f"bind {LOOPBACK}",
            f"port {0 if self._authority else port}",
            f'requirepass "{SENTINEL_PASSWORD}"',
            f"dir {self._folder}",
            f"sentinel monitor {NAME} {place} {quorum}",
            f'sentinel auth-pass {NAME} "{PASSWORD}"',
            f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"',
            *(f"sentinel {name} {NAME} {value}" for name, value in QUICK.items()),
            *(self._tls_lines(port) if self._authority else ()),
        ]
        configuration = self._folder / f"sentinel-{port}.conf"
        configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        program = redis_server() if self._authority else valkey.server_command(self._folder, 0)[0]
        self._start(port, [program, str(configuration), "--sentinel"], SENTINEL_PASSWORD)

    def _tls_lines(self, port: int) -> list[str]:
        assert self._authority is not None
        return [
            f"tls-port {port}",
            f"tls-cert-file {self._certificate}",
            f"tls-key-file {self._certificate}",
            f"tls-ca-cert-file {self._authority.file}",
            "tls-auth-clients yes",
            "tls-replication yes",
        ]

    def _start(self, port: int, command: Sequence[str], password: str) -> None:
        with (self._folder / f"{port}.log").open("wb") as log:
            self._processes[port] = subprocess.Popen(command, stdout=log, stderr=log)

        def answers() -> bool:
            assert self._processes[port].poll() is None, self._log(port)
            try:
                with self.client(port, password) as client:
                    return bool(client.ping())
            except RedisError:
                return False

        wait_until(answers, 30, f"port {port} answers", lambda: self._log(port))

    def _log(self, port: int) -> str:
        return (self._folder / f"{port}.log").read_text(errors="replace")[-2000:]

    def _is_settled(self) -> bool:
        for port in self.sentinel_ports:
            with self.client(port, SENTINEL_PASSWORD) as sentinel:
                state = sentinel.sentinel_masters()[NAME]
            others = (int(state["num-other-sentinels"]), int(state["num-slaves"]))
            if others != (len(self.sentinel_ports) - 1, len(self.ports) - 1):
                return False
        return self.replicas_in_step()
