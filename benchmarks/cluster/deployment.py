"""Run the service as a production does, a host for each process: TLS, sentinels, bucket, proxy.

Two services behind nginx, three workers with the miniature, a primary and its replica, three
sentinels, and an S3 server. Redis, its replication and the sentinels speak TLS only, ask for
clients' certificates, and have passwords.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final, cast
from urllib.error import URLError

import httpx
from redis import Redis
from redis.sentinel import SentinelConnectionPool

from benchmarks.cluster.namespaces import NETWORK, Network
from benchmarks.cluster.supervisor import Supervisor
from benchmarks.fixtures.certificates import Authority
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until
from jobs.redis_client import connect

PRIMARY: Final = "wan"
PORT: Final = {"redis": 6379, "sentinel": 26379, "service": 8000, "proxy": 8080, "s3": 9000}
SERVERS: Final = ("redis-0", "redis-1")
SENTINELS: Final = ("sentinel-0", "sentinel-1", "sentinel-2")
SERVICES: Final = ("service-0", "service-1")
WORKERS: Final = ("worker-0", "worker-1", "worker-2")

DOWN_AFTER_MS: Final = 2000
"""After so long without an answer a sentinel calls the primary down; 30 s by default."""


class Deployment:
    """A context manager: everything is ready inside the block."""

    def __init__(self, folder: Path, network: Network, supervisor: Supervisor) -> None:
        self._folder = folder
        self._network = network
        self.supervisor = supervisor
        self._password, self._sentinel_password = secrets.token_hex(16), secrets.token_hex(16)
        self._authority = Authority(folder)
        for name in (*SERVERS, *SENTINELS, *SERVICES, *WORKERS, "s3", "proxy"):
            network.add(name)
        self.redis: Redis = connect(self.redis_url("bench", f"{NETWORK}.1"))
        self.client = httpx.Client(timeout=15)

    def __enter__(self) -> Deployment:
        self._start_redis()
        self._start_s3()
        for name in WORKERS:
            self._start_product(name, "worker")
        key = self._make_key()
        self.client.headers["Authorization"] = f"Bearer {key}"
        for name in SERVICES:
            self._start_product(name, "service")
        self._start_proxy()
        self.wait_until_ready(300)
        return self

    def __exit__(self, *_: object) -> None:
        self.redis.close()
        self.client.close()

    @property
    def url(self) -> str:
        """The base URL of the proxy."""
        return f"http://{self._address('proxy')}:{PORT['proxy']}"

    def redis_url(self, name: str, address: str) -> str:
        """Return the REDIS_URL of a client with a certificate for its own address."""
        own = self._authority.issue(f"{name}-client", address)
        places = ",".join(f"{self._address(each)}:{PORT['sentinel']}" for each in SENTINELS)
        tls = f"ssl_ca_certs={self._authority.file}&ssl_certfile={own}&ssl_keyfile={own}"
        return (
            f"rediss+sentinel://:{self._password}@{places}/{PRIMARY}/0"
            f"?{tls}&sentinel_password={self._sentinel_password}"
        )

    def primary(self) -> str:
        """Return the name of the server that is the primary now."""
        pool = cast("SentinelConnectionPool", self.redis.connection_pool)
        address = str(pool.get_master_address()[0])  # type: ignore[no-untyped-call]
        return next(name for name in SERVERS if self._address(name) == address)

    def worker_of(self, worker_id: str | None) -> str | None:
        """Return the name of the process that is the worker with this id."""
        pid: Any = self.redis.hget(f"rq:worker:{worker_id}", "pid")
        return self.supervisor.pids().get(int(pid)) if pid else None

    def wait_until_ready(self, limit_s: float) -> None:
        """Wait until the proxy's services see all workers."""

        def ready() -> bool:
            answers = [self._readiness(name) for name in SERVICES] + [self._readiness("proxy")]
            return answers == [len(WORKERS)] * len(answers)

        wait_until(ready, limit_s, "everything is ready", self.supervisor.logs, every_s=0.5)

    def is_ready(self, service: str) -> bool:
        """Return whether one service answers that it is ready."""
        return self._readiness(service) >= 1

    def _readiness(self, name: str) -> int:
        port = PORT["proxy" if name == "proxy" else "service"]
        try:
            response = self.client.get(f"http://{self._address(name)}:{port}/readyz")
            return int(response.json()["workers"]) if response.status_code == 200 else 0
        except (httpx.TransportError, ValueError):
            return 0

    def _address(self, name: str) -> str:
        return self._network.hosts[name].address

    def _run(self, name: str, *command: str, **environment: str) -> None:
        command = tuple(self._network.hosts[name].command(*command))
        self.supervisor.start(name, command, environment)

    # ------------------------------------------------------------------ Redis

    def _start_redis(self) -> None:
        program = Path(sys.prefix) / "bin" / "redis-server"
        assert program.exists(), f"run sh deploy/install/redis.sh {sys.prefix}"
        first = self._address(SERVERS[0])
        for name in SERVERS:
            lines = [
                *self._tls(name, PORT["redis"]),
                f"requirepass {self._password}",
                f"masterauth {self._password}",
                "appendonly yes",
                "appendfsync always",
                'save ""',
                "repl-diskless-sync-delay 0",
                *([] if name == SERVERS[0] else [f"replicaof {first} {PORT['redis']}"]),
            ]
            self._run(name, str(program), self._write(name, lines))
        for name in SENTINELS:
            lines = [
                *self._tls(name, PORT["sentinel"]),
                f"requirepass {self._sentinel_password}",
                f"sentinel monitor {PRIMARY} {first} {PORT['redis']} 2",
                f"sentinel auth-pass {PRIMARY} {self._password}",
                f"sentinel sentinel-pass {self._sentinel_password}",
                f"sentinel down-after-milliseconds {PRIMARY} {DOWN_AFTER_MS}",
                f"sentinel failover-timeout {PRIMARY} 10000",
            ]
            self._run(name, str(program), self._write(name, lines), "--sentinel")
        wait_until(self._redis_is_settled, 60, "the sentinels agree", self.supervisor.logs)

    def _tls(self, name: str, port: int) -> list[str]:
        folder = self._folder / name
        folder.mkdir()
        own = self._authority.issue(name, self._address(name))
        return [
            f"bind {self._address(name)}",
            "port 0",
            f"tls-port {port}",
            f"tls-cert-file {own}",
            f"tls-key-file {own}",
            f"tls-ca-cert-file {self._authority.file}",
            "tls-auth-clients yes",
            "tls-replication yes",
            f"dir {folder}",
        ]

    def _write(self, name: str, lines: list[str]) -> str:
        path = self._folder / f"{name}.conf"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    def _redis_is_settled(self) -> bool:
        try:
            pool = cast("SentinelConnectionPool", self.redis.connection_pool)
            states = [each.sentinel_masters()[PRIMARY] for each in pool.sentinel_manager.sentinels]
            known = {(int(s["num-other-sentinels"]), int(s["num-slaves"])) for s in states}
            self.redis.set("settled", "1")
            return known == {(len(SENTINELS) - 1, 1)} and self.redis.wait(1, 100) == 1
        except Exception:  # noqa: BLE001  # whatever it is, it is not settled
            return False

    # ------------------------------------------------------------------ the rest

    def _start_s3(self) -> None:
        address, port = self._address("s3"), str(PORT["s3"])
        self._run("s3", sys.executable, "-m", "moto.server", "-H", address, "-p", port)
        url = f"http://{address}:{port}"

        def answers() -> bool:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            except (URLError, OSError):
                return False
            return True

        wait_until(answers, 60, "the S3 server answers", self.supervisor.logs)
        bucket = urllib.request.Request(f"{url}/videos", method="PUT")
        urllib.request.urlopen(bucket, timeout=30).close()

    def _environment(self, name: str) -> dict[str, str]:
        return {
            "REDIS_URL": self.redis_url(name, self._address(name)),
            "ARTIFACTS_URL": f"s3://videos/wan?endpoint=http://{self._address('s3')}:{PORT['s3']}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "OMP_WAIT_POLICY": "passive",
            "WORKER_DEVICE": "cpu",
            "WORKER_THREADS": "1",
            "SERVICE_HOST": self._address(name),
            "SERVICE_PORT": str(PORT["service"]),
            "SERVICE_PUBLIC_URL": self.url,
            "SERVICE_STATE_DIR": str(self._folder / f"{name}-state"),
            "FORWARDED_ALLOW_IPS": self._address("proxy"),
            "REDIS_WAIT_REPLICAS": "1",
            "SERVICE_RATE": "100000/minute",  # all that one caller asks while it waits
        }

    def _start_product(self, name: str, package: str) -> None:
        self._run(name, sys.executable, "-m", package, **self._environment(name))

    def _make_key(self) -> str:
        command = [sys.executable, "-m", "service", "keys", "add", "bench", "--role", "ops"]
        done = subprocess.run(
            self._network.hosts["service-0"].command(*command),
            env={**os.environ, **self._environment("service-0")},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def _start_proxy(self) -> None:
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        assert Path(program).exists(), "install nginx: apt-get install nginx-light"
        folder = self._folder / "proxy"
        folder.mkdir()
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{each}_temp_path {folder}/{each};" for each in paths)
        servers = " ".join(
            f"server {self._address(each)}:{PORT['service']} max_fails=1 fail_timeout=2s;"
            for each in SERVICES
        )
        text = f"""
            daemon off; worker_processes 1; pid {folder}/pid; error_log stderr; user root;
            events {{}}
            http {{
                access_log off; {temporary}
                upstream service {{ {servers} keepalive 16; }}
                server {{
                    listen {self._address("proxy")}:{PORT["proxy"]};
                    client_max_body_size 4m;
                    location / {{
                        proxy_pass http://service;
                        proxy_http_version 1.1;
                        proxy_set_header Connection "";
                        proxy_set_header Host $http_host;
                        proxy_set_header X-Forwarded-For $remote_addr;
                        proxy_buffering off;
                        proxy_connect_timeout 1s;
                        proxy_read_timeout 60s;
                    }}
                }}
            }}
        """
        configuration = self._write("nginx", [text])
        self._run("proxy", program, "-c", configuration, "-e", "stderr")
