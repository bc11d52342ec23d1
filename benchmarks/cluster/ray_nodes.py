"""Kill a node of a Ray cluster under jobs: `python -m benchmarks.cluster.ray_nodes` (root only).

Two Ray nodes in network namespaces of their own, each with two make-believe cards, hold one worker
each with the shipped miniature, put there by `python -m deploy.ray up`. Valkey has a namespace,
too; the service runs beside the caller. While both workers have a job in hand, every process of the
second node is killed at once. Ray has to start that worker again on the first, and its job has to
be run again; every accepted job has to end exactly once. Afterwards `down` drains the workers.

It needs Ray, from `make test-ray` or `pip install '.[ray]' -c constraints.txt`. It prints a table,
then the result as one line of JSON, and saves it in benchmarks/results/. The exit status is 1 if a
job was lost, ended twice or failed, or a recovery took longer than a minute.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final, cast

import httpx
import typer
from redis import Redis

from benchmarks import report
from benchmarks.cluster.caller import EVERY, LONG, MOST_OPEN, SHORT, Caller, check
from benchmarks.cluster.namespaces import Network
from benchmarks.cluster.supervisor import Supervisor
from benchmarks.report import Row
from deploy.local import valkey
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.redis_client import connect

NODES: Final = ("node-0", "node-1")
CARDS: Final = {"Ascend910": 2}
RAY_PORT: Final = 6380
REDIS_PORT: Final = 6379
BOUND_S: Final = 60.0


class RayDeployment:
    """A context manager: two Ray nodes, Valkey and a service are up inside the block."""

    def __init__(self, folder: Path, network: Network, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.client = httpx.Client(timeout=15)
        self._folder, self._network = folder, network
        for name in (*NODES, "redis"):
            network.add(name)
        self._password = secrets.token_hex(16)
        self._port = find_free_port()
        address = f"{network.hosts['redis'].address}:{REDIS_PORT}"
        self.redis_url = f"redis://:{self._password}@{address}/0"
        self.redis: Redis = connect(self.redis_url)
        self.environment = {
            "REDIS_URL": self.redis_url,
            "ARTIFACTS_URL": (folder / "artifacts").as_uri(),
            "WORKER_THREADS": "1",
            "RAY_ADDRESS": f"{network.hosts[NODES[0]].address}:{RAY_PORT}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # 15 by default: on a busy machine hardly a job would end
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "OMP_WAIT_POLICY": "passive",
        }

    @property
    def url(self) -> str:
        """The base URL of the service."""
        return f"http://{LOOPBACK}:{self._port}"

    def __enter__(self) -> RayDeployment:
        data = self._folder / "valkey"
        data.mkdir()
        redis = self._network.hosts["redis"]
        command = valkey.server_command(data, REDIS_PORT, self._password)
        command[command.index("--bind") + 1] = redis.address
        self.supervisor.start("valkey", redis.command(*command))
        wait_until(self._redis_answers, 30, "Valkey answers", self.supervisor.logs)
        service = {"SERVICE_PORT": str(self._port), "SERVICE_STATE_DIR": str(self._folder / "s")}
        command = [sys.executable, "-m", "service"]
        self.supervisor.start("service", command, self.environment | service)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.redis.close()

    def start_node(self, name: str) -> float:
        """Start Ray on a node; return the seconds until it takes part."""
        host = self._network.hosts[name]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--node-ip-address={host.address}", "--num-cpus=2", "--disable-usage-stats"]
        command += [f"--resources={json.dumps(CARDS)}"]
        if name == NODES[0]:
            command += ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
            command += [f"--temp-dir={self._folder / 'ray'}"]
        else:
            command += [f"--address={self.environment['RAY_ADDRESS']}"]
        started = time.monotonic()
        self.supervisor.start(name, host.command(*command), self.environment)
        wait_until(
            lambda: "Ray runtime started" in self.supervisor.log(name),
            90,
            f"Ray runs on {name}",
            self.supervisor.logs,
            every_s=0.1,
        )
        return time.monotonic() - started

    def launcher(self, *arguments: str) -> str:
        """Run `python -m deploy.ray` on the first node; return what it prints."""
        command = [sys.executable, "-m", "deploy.ray", *arguments]
        done = subprocess.run(
            self._network.hosts[NODES[0]].command(*command),
            cwd=ROOT,
            env={**os.environ, **self.environment},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.supervisor.logs()}"
        return done.stdout

    def status(self) -> list[dict[str, Any]]:
        """Return what the launcher tells of the workers."""
        found: list[dict[str, Any]] = json.loads(self.launcher("status", "--json"))
        return found

    def live_workers(self) -> int:
        """Return how many workers offer the model."""
        return len(catalog.read(self.redis).offers)

    def running(self, job_ids: list[str]) -> dict[str, str]:
        """Return the worker ids by the ids of the jobs that run."""
        found = {}
        for job_id in job_ids:
            state, worker = cast("Any", self.redis).hmget(f"wan:job:{job_id}", "state", "worker")
            if state == b"running":
                found[job_id] = worker.decode()
        return found

    def node_of(self, worker_id: str) -> str:
        """Return the node on which a worker process runs, by its network namespace.

        Raises:
            LookupError: it runs nowhere.
        """
        pid = int(self.redis.hget(f"rq:worker:{worker_id}", "pid") or 0)
        try:
            own = os.stat(f"/proc/{pid}/ns/net").st_ino
        except FileNotFoundError:
            raise LookupError(f"the process {pid} has ended") from None
        for name in NODES:
            if os.stat(f"/run/netns/{self._network.hosts[name].namespace}").st_ino == own:
                return name
        raise LookupError(f"the process {pid} runs on no node")

    def attempts(self, job_id: str) -> int:
        """Return how often a job was begun."""
        return int(self.redis.hget(f"wan:job:{job_id}", "attempts") or 0)

    def _redis_answers(self) -> bool:
        try:
            return bool(self.redis.ping())
        except Exception:  # noqa: BLE001  # whatever it is, it does not answer
            return False


def main(
    jobs: Annotated[int, typer.Option(min=20, help="How many jobs to submit.")] = 30,
    keep: Annotated[Path | None, typer.Option(help="A folder for logs, to look at them.")] = None,
) -> None:
    """Run workers on two Ray nodes, kill one node, and check every job."""
    rows: list[Row] = []

    def note(what: str, seconds: float) -> None:
        rows.append(Row(what, round(seconds, 2), "s"))
        print(f"{what}: {seconds:.2f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="wr-") as temporary:
        folder = keep or Path(temporary)
        with (
            Network() as network,
            Supervisor(folder) as supervisor,
            RayDeployment(folder, network, supervisor) as deployment,
        ):
            for name in NODES:
                note(f"Ray started on {name}", deployment.start_node(name))
            started = time.monotonic()
            up = ["up", "--device", "cpu", "--resource", "Ascend910", "--workers", "2"]
            deployment.launcher(*up, "--wait-s", "180")
            note("`up`: until both workers are ready", time.monotonic() - started)
            caller = Caller(deployment)
            caller.start()
            caller.allow(jobs)
            in_hand = both_busy(deployment, caller)
            victim = next(job for job, node in in_hand.items() if node == NODES[1])
            supervisor.hold(NODES[1])
            killed = network.hosts[NODES[1]].kill_everything()
            away = time.monotonic()
            rows.append(Row("processes killed with the node", float(killed), ""))
            assert victim in deployment.running([victim]), "its job ended in the last moment"
            wait_until(
                lambda: deployment.attempts(victim) > 1 or not deployment.running([victim]),
                180,
                "the job is given back",
                supervisor.logs,
            )
            note("node killed: until its job is back in the queue", time.monotonic() - away)
            wait_until(
                lambda: deployment.attempts(victim) > 1,
                180,
                "the job is begun again",
                supervisor.logs,
            )
            note("its job: until it is begun again", time.monotonic() - away)
            wait_until(
                lambda: deployment.live_workers() == 2 and both_on(deployment, NODES[0]),
                180,
                "both workers are on the first node",
                supervisor.logs,
                every_s=0.5,
            )
            note("node killed: until Ray has its worker back, ready", time.monotonic() - away)
            caller.finish(600)
            verdict = check(deployment, caller)
            started = time.monotonic()
            ends = deployment.launcher("down", "--grace-s", "60")
            note("`down`: until both workers have ended", time.monotonic() - started)
            drained = ends.count("ended with status 0")
            left = deployment.status()
        orphans = supervisor.orphans()
    rows = [
        Row("jobs accepted", float(len(caller.seen.at)), ""),
        *verdict.rows(),
        Row("workers that `down` ended with status 0 (bound 2)", float(drained), ""),
        Row("processes left behind (bound 0)", float(len(orphans)), ""),
        *rows,
        Row(
            "jobs begun more than once", float(sum(n > 1 for n in verdict.attempts.elements())), ""
        ),
        *caller.seen.rows(),
    ]
    settings = {"jobs": jobs, "short": SHORT, "long": LONG, "every": EVERY, "most_open": MOST_OPEN}
    settings |= {"cards": CARDS, "cores": os.cpu_count(), "ends": dict(verdict.states)}
    document = report.result("ray_nodes", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))
    slow = [row.what for row in rows if row.what.startswith("node killed") and row.value > BOUND_S]
    if verdict.is_bad or orphans or slow or left or drained != len(NODES):
        sys.exit(f"{verdict}, left behind {orphans} {left}, too slow: {slow}, ends: {ends}")


def both_busy(deployment: RayDeployment, caller: Caller) -> dict[str, str]:
    """Wait until both nodes run a job; return the nodes by job."""
    found: dict[str, str] = {}

    def look() -> bool:
        found.clear()
        running = deployment.running(list(caller.seen.at))
        try:
            found.update({job: deployment.node_of(worker) for job, worker in running.items()})
        except LookupError:
            return False
        return set(found.values()) == set(NODES)

    wait_until(look, 180, "both nodes are busy", deployment.supervisor.logs, every_s=0.05)
    return found


def both_on(deployment: RayDeployment, node: str) -> bool:
    """Return whether every live worker runs on one node."""
    try:
        offers = catalog.read(deployment.redis).offers
        return {deployment.node_of(each.worker_id) for each in offers} == {node}
    except LookupError:
        return False


if __name__ == "__main__":
    typer.run(main)
