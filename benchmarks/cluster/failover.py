"""Break a whole deployment while it works: `python -m benchmarks.cluster.failover` (root only).

Each process has a network namespace of its own: two services behind nginx, three workers with the
shipped miniature, a primary, its replica and three sentinels (Debian's Redis with TLS, certificates
on both sides, passwords), and a bucket. A caller keeps submitting short jobs through the proxy.
Meanwhile the cable of a busy worker is pulled for longer than a lease, the primary is killed and
comes back after a while, and both services are replaced one after the other.

Afterwards every accepted job is checked: it must have ended exactly once in the record that the
fail-over left, its video must be whole, and no job may be there that nobody asked for. It prints a
table, then the result as one line of JSON, and saves it in benchmarks/results/. The exit status is
1 if a job was lost, ended twice, failed or has a broken video.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from redis.exceptions import RedisError

from benchmarks import report
from benchmarks.cluster.caller import EVERY, LONG, MOST_OPEN, SHORT, Caller, check
from benchmarks.cluster.deployment import DOWN_AFTER_MS, SERVICES, Deployment
from benchmarks.cluster.namespaces import Network
from benchmarks.cluster.supervisor import Supervisor
from benchmarks.report import Row
from deploy.local.cluster import ENDED
from deploy.local.waiting import wait_until

CUT_S: Final = 40.0
"""How long the cable is out: well beyond a lease of 15 s, so that another worker takes the job."""
AWAY_S: Final = 15.0
"""How long the killed primary stays away; meanwhile there is no replica to confirm a new job."""


class Faults:
    """Breaks one thing after another, each while jobs run, and measures until it works again."""

    def __init__(self, deployment: Deployment, caller: Caller) -> None:
        self._deployment = deployment
        self._supervisor = deployment.supervisor
        self._caller = caller
        self.rows: list[Row] = []
        self.victims: dict[str, str] = {}

    def cut_a_worker_off(self, network: Network) -> None:
        """Pull the cable of a worker that has a job in hand, until another has taken that job."""
        worker, job_id = self._busy_worker()
        self.victims["worker"] = worker
        network.hosts[worker].pull_cable()
        started = time.monotonic()

        def taken() -> bool:
            record = self._record(job_id)
            return int(record.get("attempts", 0)) > 1 or record.get("state") in ENDED

        self._measure("cable pulled: until another worker has its job", taken, started)
        time.sleep(max(0.0, started + CUT_S - time.monotonic()))
        network.hosts[worker].plug_in()
        mended = time.monotonic()
        self._measure(
            "cable back: until the worker is live again", lambda: self._is_live(worker), mended
        )

    def kill_the_primary(self) -> None:
        """Kill the primary; it comes back later and becomes the replica."""
        self._busy_worker()
        primary = self._deployment.primary()
        self.victims["primary"] = primary
        self._supervisor.hold(primary)
        self._supervisor.kill(primary)
        started = time.monotonic()
        ended = set(self._caller.seen.ended)
        back = threading.Timer(AWAY_S, self._supervisor.release, [primary])
        back.start()
        self._measure(
            "primary killed: until another server is the primary",
            lambda: self._deployment.primary() != primary,
            started,
        )
        self._measure(
            "primary killed: until both services are ready again",
            lambda: all(map(self._deployment.is_ready, SERVICES)),
            started,
        )
        self._measure(
            "primary killed: until a job has ended again",
            lambda: set(self._caller.seen.ended) - ended,
            started,
        )
        self._measure(
            f"primary killed: until a job is accepted (a replica is back after {AWAY_S:.0f} s)",
            lambda: max(self._caller.seen.at.values()) > started,
            started,
        )
        back.join()

    def roll_the_services(self) -> None:
        """Replace one service after the other; the next one only when the first is ready."""
        before = self._caller.seen.repeated
        slowest = 0.0
        for name in SERVICES:
            started = time.monotonic()
            self._supervisor.restart(name)
            wait_until(
                lambda name=name: self._deployment.is_ready(name),  # type: ignore[misc]
                120,
                f"{name} is ready",
                self._supervisor.logs,
            )
            slowest = max(slowest, time.monotonic() - started)
        self.rows.append(Row("services replaced: the slower, until ready", round(slowest, 2), "s"))
        repeated = float(self._caller.seen.repeated - before)
        self.rows.append(Row("services replaced: requests that had to be repeated", repeated, ""))

    def _busy_worker(self) -> tuple[str, str]:
        found: list[tuple[str, str]] = []

        def look() -> bool:
            for job_id in list(self._caller.seen.at)[::EVERY]:
                record = self._record(job_id)
                if record.get("state") == "running":
                    worker = self._deployment.worker_of(record.get("worker"))
                    found.extend([(worker, job_id)] if worker else [])
            return bool(found)

        wait_until(look, 120, "a worker is busy", self._supervisor.logs)
        return found[-1]

    def _record(self, job_id: str) -> dict[str, str]:
        found: Any = self._deployment.redis.hgetall(f"wan:job:{job_id}")
        return {name.decode(): value.decode() for name, value in found.items()}

    def _is_live(self, worker: str) -> bool:
        answer = self._caller.request("GET", "/workers")
        live = [each["id"] for each in answer.json()["workers"]]
        return any(self._deployment.worker_of(each) == worker for each in live)

    def _measure(self, what: str, condition: Callable[[], object], started: float) -> None:
        def holds() -> bool:
            self._caller.raise_error()
            try:
                return bool(condition())
            except (RedisError, StopIteration):
                return False

        wait_until(holds, 180, what, self._supervisor.logs, every_s=0.05)
        self.rows.append(Row(what, round(time.monotonic() - started, 2), "s"))
        print(f"{what}: {self.rows[-1].value} s", file=sys.stderr, flush=True)


def main(
    jobs: Annotated[int, typer.Option(min=20, help="How many jobs to submit.")] = 60,
    keep: Annotated[Path | None, typer.Option(help="A folder for logs, to look at them.")] = None,
) -> None:
    """Run the deployment, break it, and check every job."""
    with tempfile.TemporaryDirectory(prefix="wan-cluster-") as temporary:
        folder = keep or Path(temporary)
        with (
            Network() as network,
            Supervisor(folder) as supervisor,
            Deployment(folder, network, supervisor) as deployment,
        ):
            print("everything is ready", file=sys.stderr, flush=True)
            caller = Caller(deployment)
            faults = Faults(deployment, caller)
            started = time.monotonic()
            caller.start()
            caller.allow(jobs // 3)
            faults.cut_a_worker_off(network)
            caller.allow(jobs // 3)
            faults.kill_the_primary()
            caller.allow(jobs - 2 * (jobs // 3))
            faults.roll_the_services()
            caller.finish(900)
            whole_s = time.monotonic() - started
            verdict = check(deployment, caller)
            restarts = supervisor.restarts
        orphans = supervisor.orphans()
    seen = caller.seen
    rows = [
        Row("jobs accepted", float(len(seen.at)), ""),
        *verdict.rows(),
        Row("processes left behind (bound 0)", float(len(orphans)), ""),
        *faults.rows,
        Row(
            "jobs begun more than once", float(sum(n > 1 for n in verdict.attempts.elements())), ""
        ),
        *seen.rows(),
        Row("the whole run", round(whole_s, 1), "s"),
    ]
    settings = {
        "jobs": jobs,
        "short": SHORT,
        "long": LONG,
        "cut_s": CUT_S,
        "primary_away_s": AWAY_S,
        "down_after_ms": DOWN_AFTER_MS,
        "wait_replicas": 1,
        "most_open": MOST_OPEN,
        "cores": os.cpu_count(),
        "victims": faults.victims,
        "ends": dict(verdict.states),
        "attempts": {str(n): count for n, count in sorted(verdict.attempts.items())},
        "restarts": restarts,
    }
    document = report.result("failover", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))
    if verdict.is_bad or orphans:
        sys.exit(f"{verdict}, left behind {orphans}")


if __name__ == "__main__":
    typer.run(main)
