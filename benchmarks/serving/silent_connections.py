"""Measure the service under silent connections: `python -m benchmarks.serving.silent_connections`.

One service process, with its usual settings, gets requests at a fixed rate: first alone, which is
the baseline, then while a process of its own keeps so many connections open that never send
anything, and opens another for each that is closed. Measured are the 99th percentile of
`GET /healthz` and `POST /generate`, the descriptors that the process has open, and the bytes that
it logs. Of the lines in its log, those of requests are counted separately: they are written with
and without silent connections.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import asyncio
import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving import load_generator
from benchmarks.serving.api_latency import BODY, add_key, kept_offer, percentile_ms, run_cluster
from deploy.local.cluster import Cluster
from deploy.local.waiting import wait_until

RATES_PER_S = {"GET /healthz": 20.0, "POST /generate": 10.0}


@dataclass(frozen=True, slots=True)
class Stretch:
    """What was measured in one stretch of time."""

    responses: dict[str, load_generator.Responses]
    descriptors: int
    log_bytes: int
    access_bytes: int


def main(
    connections: Annotated[int, typer.Option(min=0, help="Silent connections.")] = 2000,
    seconds: Annotated[float, typer.Option(help="Length of each of the two stretches.")] = 60.0,
) -> None:
    """Run both stretches and write the result."""
    limits = {"SERVICE_MAX_WAITING": "10000000", "SERVICE_RATE": "100000000/minute"}
    with run_cluster(environment=limits) as cluster, kept_offer(cluster):
        key = add_key(cluster)
        alone = asyncio.run(measure(cluster, key, seconds))
        with silent_connections(cluster, connections) as opened:
            crowded = asyncio.run(measure(cluster, key, seconds))
            tries = opened()
    rows = [
        *latencies(alone, crowded, connections),
        Row("descriptors, most", crowded.descriptors, "1", baseline=alone.descriptors),
        Row("log in all", crowded.log_bytes, "B", baseline=alone.log_bytes),
        Row(
            "log without the lines of requests",
            crowded.log_bytes - crowded.access_bytes,
            "B",
            baseline=alone.log_bytes - alone.access_bytes,
        ),
        Row("silent connections opened in all", tries, "1"),
    ]
    settings = {
        "connections": connections,
        "seconds": seconds,
        "rates_per_s": RATES_PER_S,
        "cores": os.cpu_count(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }
    document = report.result("silent_connections", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def latencies(alone: Stretch, crowded: Stretch, connections: int) -> Iterator[Row]:
    """Compare the answers, all of which are to succeed."""
    for what in RATES_PER_S:
        for percent in (50, 99):
            yield Row(
                f"p{percent} of {what}, {connections} silent connections",
                percentile_ms(crowded.responses[what].seconds, percent),
                "ms",
                baseline=percentile_ms(alone.responses[what].seconds, percent),
            )
        failed, failed_alone = (
            sum(n for status, n in each.responses[what].statuses.items() if status // 100 != 2)
            for each in (crowded, alone)
        )
        yield Row(f"{what} not answered with success", failed, "1", baseline=failed_alone)


async def measure(cluster: Cluster, key: str, seconds: float) -> Stretch:
    """Send both kinds of requests at their rates, and look at the process meanwhile."""
    port = int(cluster.urls[0].rsplit(":", 1)[1])
    pid = cluster.pids("api")["api-0"]
    log = cluster.folder / "logs" / "api-0.log"
    authorized = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    requests = {
        "GET /healthz": load_generator.request_bytes("GET", "/healthz", {"Connection": "close"}),
        "POST /generate": load_generator.request_bytes("POST", "/generate", authorized, BODY),
    }
    start, most = log.stat().st_size, 0
    loads = [
        asyncio.create_task(load_generator.run_open_loop(port, requests[what], rate, seconds))
        for what, rate in RATES_PER_S.items()
    ]
    while not all(load.done() for load in loads):
        most = max(most, len(os.listdir(f"/proc/{pid}/fd")))
        await asyncio.sleep(0.1)
    written = log.read_bytes()[start:]
    lines = written.splitlines(keepends=True)
    return Stretch(
        dict(zip(RATES_PER_S, [load.result() for load in loads], strict=True)),
        most,
        len(written),
        sum(len(line) for line in lines if b" service.access " in line),
    )


@contextmanager
def silent_connections(cluster: Cluster, connections: int) -> Iterator[Callable[[], int]]:
    """Keep connections open from a process of its own; yields what counts those it opened."""
    spawning = multiprocessing.get_context("spawn")
    is_open, opened = spawning.Value("i", 0), spawning.Value("i", 0)
    port = int(cluster.urls[0].rsplit(":", 1)[1])
    process = spawning.Process(target=keep_open, args=(port, connections, is_open, opened))
    process.start()
    try:
        wait_until(lambda: is_open.value >= connections, 60, "the connections are open")
        yield lambda: opened.value
    finally:
        process.kill()
        process.join()


def keep_open(port: int, connections: int, is_open: Any, opened: Any) -> None:
    """Keep so many silent connections open for ever; count those that are open, and were."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, connections + 100)), hard))

    async def keep_one() -> None:
        while True:
            with suppress(OSError):
                async with load_generator.connection(port) as (reader, _):
                    is_open.value += 1
                    opened.value += 1
                    try:
                        while await reader.read(1000):
                            pass
                    finally:
                        is_open.value -= 1

    async def keep_all() -> None:
        await asyncio.gather(*(keep_one() for _ in range(connections)))

    asyncio.run(keep_all())


if __name__ == "__main__":
    typer.run(main)
