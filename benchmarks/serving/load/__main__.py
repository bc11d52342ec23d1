"""Measure a full service for minutes: `python -m benchmarks.serving.load --minutes 10`.

Twenty users, each with a key and a quota, fill the queue with 10,000 jobs and keep it full while
two workers, whose engine only sleeps, take from it. Ten event streams of each user are open. At
fixed rates the users read, list and cancel jobs, fetch videos and ask for more, also beyond their
quotas, and an operator reads what `/ops` and Prometheus read. The baseline of each latency and of
each process' memory is the same with some jobs in the queue, before it is filled.

At the end every job that was accepted must have ended once, or wait once in its queue.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import asyncio
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving.load.account import Account, check_jobs
from benchmarks.serving.load_generator import connection, read_whole, request_bytes
from deploy.local.cluster import Cluster
from jobs import redis_keys
from jobs.state import JobState
from service.auth.api_keys import KeyStore, Role

USERS = 20
STREAMS_EACH = 10
WORKERS = 2
SAMPLE_EVERY_S = 5.0
FEW_JOBS = 40
"""So many jobs are in the queue for the baseline."""
AT_ONCE = 8
"""Requests that fill the queue at the same time; each asks for as many jobs (`count`)."""
BODY = {"prompt": "a small red circle", "num_inference_steps": 4}

RATES_PER_S = {
    "GET /jobs/{id}": 20.0,
    "GET /jobs": 4.0,
    "POST /generate": 4.0,
    "POST /generate over the quota": 1.0,
    "DELETE /jobs/{id}": 1.0,
    "GET /jobs/{id}/video.mp4": 1.0,
    "GET /readyz": 1.0,
    "GET /workers": 0.33,
    "GET /metrics": 0.2,
    "GET /series": 0.2,
    "GET /failures": 0.2,
}
"""What is sent to the service, by what it measures."""


@dataclass(frozen=True, slots=True)
class User:
    """A user's key, and the most jobs that the user may have waiting and running."""

    name: str
    key: str
    quota: int


@dataclass(slots=True)
class Measured:
    """One stretch: latencies in seconds by endpoint; of each process its memory over time, and the
    share of a core that it used.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[str, dict[int, int]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(int))
    )
    memory_mb: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cores: dict[str, float] = field(default_factory=dict)


def main(
    minutes: Annotated[float, typer.Option(help="Length of the measured stretch.")] = 10.0,
    jobs: Annotated[int, typer.Option(min=200, help="Jobs that wait in the queue.")] = 10_000,
    step_s: Annotated[float, typer.Option(help="Seconds of a step; a job has four.")] = 0.25,
) -> None:
    """Run the load, check that no job is lost, and write the result."""
    engine = (sys.executable, "-m", "benchmarks.serving.fake_worker", str(step_s))
    limits = {
        "SERVICE_MAX_WAITING": str(2 * jobs),
        "SERVICE_RATE": "1000000/minute",
        "SERVICE_MAX_STREAMS": "1000",
    }
    with (
        tempfile.TemporaryDirectory(prefix="wan-bench-") as folder,
        Cluster(
            Path(folder), apis=1, workers=WORKERS, worker=engine, environment=limits
        ) as cluster,
    ):
        load = Load(cluster, jobs)
        rows, details = asyncio.run(load.run(minutes * 60))
    settings = {
        "minutes": minutes,
        "jobs": jobs,
        "users": USERS,
        "streams": USERS * STREAMS_EACH,
        "workers": WORKERS,
        "step_s": step_s,
        "rates_per_s": RATES_PER_S,
        "cores": os.cpu_count(),
        **details,
    }
    document = report.result("load", "cpu", settings, rows)
    report.print_table(rows)
    path = report.save(document)
    print(json.dumps(document))
    print(path, file=sys.stderr)


class Load:
    """All that is sent to one API process."""

    def __init__(self, cluster: Cluster, jobs: int) -> None:
        self._cluster = cluster
        self._jobs = jobs
        self._port = int(cluster.urls[0].rsplit(":", 1)[1])
        keys = KeyStore(cluster.redis)
        self._ops = keys.add("ops", Role.OPS)[1]
        # Together the quotas are a little more than the queue is to hold.
        quota = math.ceil(jobs / USERS) + WORKERS
        names = [f"user-{number}" for number in range(USERS)]
        self._users = [User(name, keys.add(name, Role.USER, quota)[1], quota) for name in names]
        self._full = User("full", keys.add("full", Role.USER, 1)[1], 1)
        self._account = Account()
        self._turn = itertools.cycle(self._users)
        self._seeds = itertools.count()
        self._measured = Measured()

    async def run(self, seconds: float) -> tuple[list[Row], dict[str, Any]]:
        """Measure with few jobs, fill the queue, measure again, and check all jobs."""
        await self._submit(self._full, 1, "")
        await self._fill(FEW_JOBS)
        few = await self._stretch(min(30.0, seconds / 2))
        started = time.perf_counter()
        await self._fill(self._jobs)
        filled_s = time.perf_counter() - started
        full = await self._stretch(seconds)
        check = check_jobs(self._cluster.redis, self._account)
        rows = [*latencies(few, full), *processes(few, full)]
        rows += [
            Row("jobs accepted a second while the queue was filled", self._jobs / filled_s, "1/s"),
            Row("jobs accepted", check.accepted, "1"),
            Row("of these ended", check.ended, "1"),
            Row("of these waiting or running", check.open, "1"),
            Row("lost (bound 0)", check.lost, "1"),
            Row("ended twice, or twice in the queue (bound 0)", check.doubled, "1"),
            Row("most jobs of a user over the quota (bound 0)", self._most_over_quota(), "1"),
        ]
        statuses = {name: dict(found) for name, found in full.statuses.items()}
        curves = {
            name: found[:: max(1, len(found) // 60)] for name, found in full.memory_mb.items()
        }
        return rows, {"statuses": statuses, "memory_mb": curves}

    async def _fill(self, jobs: int) -> None:
        """Ask for jobs, several requests at a time, until so many wait, as many of each user."""
        shares = [jobs // USERS - self._active(user) for user in self._users]
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask(user: User, count: int) -> None:
            async with gate:
                status = await self._submit(user, count, "")
                assert status == 202, f"{user.name} was answered {status}"

        await asyncio.gather(
            *(
                ask(user, min(AT_ONCE, share - done))
                for user, share in zip(self._users, shares, strict=True)
                for done in range(0, share, AT_ONCE)
            )
        )

    async def _stretch(self, seconds: float) -> Measured:
        self._measured = Measured()
        children = self._cluster.children
        before = {name: cpu_seconds(child.pid) for name, child in children.items()}
        started = time.perf_counter()
        ends = started + seconds
        async with self._streams():
            kinds: dict[str, Callable[[], Any]] = {
                "GET /jobs/{id}": self._read_job,
                "GET /jobs": self._list_jobs,
                "POST /generate": self._refill,
                "POST /generate over the quota": self._ask_too_much,
                "DELETE /jobs/{id}": self._cancel,
                "GET /jobs/{id}/video.mp4": self._fetch_video,
            }
            paths = {name.split()[1] for name in RATES_PER_S} - {n.split()[1] for n in kinds}
            for path in paths:
                kinds[f"GET {path}"] = partial(self._operate, path)
            await asyncio.gather(
                self._sample_memory(ends),
                *(self._repeat(kinds[name], rate, ends) for name, rate in RATES_PER_S.items()),
            )
        took_s = time.perf_counter() - started
        for name, child in children.items():
            self._measured.cores[name] = (cpu_seconds(child.pid) - before[name]) / took_s
        return self._measured

    async def _repeat(self, send: Callable[[], Any], per_second: float, ends: float) -> None:
        """Send at a fixed rate, whether or not earlier requests are answered."""
        tasks: set[asyncio.Task[None]] = set()
        started = time.perf_counter()
        for number in itertools.count():
            due = started + (number + random.random()) / per_second
            if due >= ends:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(send())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _read_job(self) -> None:
        user = next(self._turn)
        job_id = self._account.any_of(user.name)
        await self._send("GET /jobs/{id}", user.key, "GET", f"/jobs/{job_id}")

    async def _list_jobs(self) -> None:
        await self._send("GET /jobs", next(self._turn).key, "GET", "/jobs?limit=50")

    async def _refill(self) -> None:
        """Ask for a job for the user who has the most room."""
        user = next(self._turn)
        await self._submit(user, 1, "POST /generate")

    async def _ask_too_much(self) -> None:
        status = await self._submit(self._full, 1, "POST /generate over the quota")
        assert status in (202, 429), status

    async def _cancel(self) -> None:
        user = next(self._turn)
        job_id = self._account.newest_of(user.name)
        await self._send("DELETE /jobs/{id}", user.key, "DELETE", f"/jobs/{job_id}")

    async def _fetch_video(self) -> None:
        found: Any = self._cluster.redis.zrevrange(redis_keys.index(JobState.SUCCEEDED), 0, 50)
        if not found:
            return
        job_id = random.choice(found).decode()
        await self._send("GET /jobs/{id}/video.mp4", self._ops, "GET", f"/jobs/{job_id}/video.mp4")

    async def _operate(self, path: str) -> None:
        await self._send(f"GET {path}", self._ops, "GET", path)

    async def _submit(self, user: User, count: int, name: str) -> int:
        """Ask for jobs, and note those that are accepted; return the status."""
        body = {**BODY, "seed": next(self._seeds) * AT_ONCE % 2**31}
        if count > 1:
            body["count"] = count
        status, answer = await self._send(name, user.key, "POST", "/generate", body)
        if status == 202:
            found = json.loads(answer)
            made = found.get("jobs") or [found]
            self._account.accept(user.name, [job["id"] for job in made])
        return status

    async def _send(
        self, name: str, key: str, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own, and measure it if it has a name."""
        headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
        data = b""
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        started, status, answer = time.perf_counter(), 0, b""
        with suppress(OSError, asyncio.IncompleteReadError):
            async with connection(self._port) as (reader, writer):
                writer.write(request_bytes(method, path, headers, data))
                status, answer = await read_whole(reader)
        if name:
            self._measured.seconds[name].append(time.perf_counter() - started)
            self._measured.statuses[name][status] += 1
        return status, answer

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[None]:
        """Keep the streams of all users open; one that ends is followed by one of another job."""
        tasks = [
            asyncio.create_task(self._follow(user))
            for user in self._users
            for _ in range(STREAMS_EACH)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, user: User) -> None:
        headers = {"Authorization": f"Bearer {user.key}"}
        while True:
            path = f"/jobs/{self._account.any_of(user.name)}/events"
            with suppress(OSError):
                async with connection(self._port) as (reader, writer):
                    writer.write(request_bytes("GET", path, headers))
                    while await reader.read(65536):
                        pass
            await asyncio.sleep(1)

    async def _sample_memory(self, ends: float) -> None:
        while (now := time.perf_counter()) < ends:
            for name, child in self._cluster.children.items():
                self._measured.memory_mb[name].append(resident_mb(child.pid))
            await asyncio.sleep(min(SAMPLE_EVERY_S, max(0.1, ends - now)))

    def _active(self, user: User) -> int:
        """Count a user's jobs that wait or run."""
        redis: Any = self._cluster.redis
        states = (
            redis_keys.index(state, user.name) for state in (JobState.QUEUED, JobState.RUNNING)
        )
        return sum(redis.zcard(index) for index in states)

    def _most_over_quota(self) -> int:
        return max(0, *(self._active(user) - user.quota for user in (*self._users, self._full)))


def latencies(few: Measured, full: Measured) -> list[Row]:
    """Return the 50th and 99th percentile of each endpoint."""
    return [
        Row(
            f"p{percent} of {name}",
            percentile_ms(full.seconds[name], percent),
            "ms",
            baseline=percentile_ms(few.seconds[name], percent) if few.seconds[name] else None,
        )
        for name in RATES_PER_S
        for percent in (50, 99)
        if full.seconds[name]
    ]


def processes(few: Measured, full: Measured) -> list[Row]:
    """Return each process' memory at the end, its growth in the second half, and its computing."""
    rows = []
    for name, found in full.memory_mb.items():
        half = found[len(found) // 2 :]
        before = few.memory_mb[name][-1]
        rows += [
            Row(f"memory of {name}, at the end", found[-1], "MB", baseline=before),
            Row(f"memory of {name}, growth in the second half", half[-1] - half[0], "MB"),
            Row(
                f"cores that {name} used",
                round(full.cores[name], 3),
                "1",
                baseline=round(few.cores[name], 3),
            ),
        ]
    return rows


def percentile_ms(seconds: list[float], percent: int) -> float:
    """Return a percentile in milliseconds: the least value that so many of all do not exceed."""
    ordered = sorted(seconds)
    return round(1000 * ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)], 2)


def resident_mb(pid: int) -> float:
    """Read a process' resident memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return round(int(found.split()[1]) / 1024, 1)


def cpu_seconds(pid: int) -> float:
    """Read the CPU seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    typer.run(main)
