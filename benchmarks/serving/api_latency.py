"""Measure what the front end costs: `python -m benchmarks.serving.api_latency`.

There are three measurements, each with a baseline from the same run on one machine:

- Submitting: jobs accepted per second by one API process for 32 clients. The baseline is a bare
  FastAPI handler that enqueues the same RQ job. The service also checks the API key, its rate limit
  and quota, and the request against the live offers (including token counts), and it writes a
  durable record with its events.
- Reading: the 99th percentile of `GET /jobs/{id}` while 100 event streams are open and receive
  events. The baseline is the same without streams.
- A job: from sending the request to receiving the event of its success, minus the seconds that the
  pipeline took.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from redis import Redis

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving import load_generator
from deploy.local.cluster import WORKER, Cluster
from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer

CLIENTS = 32
STREAMS = 100
READS_PER_S = 100.0
PROMPT = "a small red circle moving right on a black background"
BODY = json.dumps({"prompt": PROMPT, "mode": "w8a8", "seed": 7}).encode()
SHORT_JOB = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2}

SUBMIT_FLOOR = 0.70
READ_BOUND_MS = 20.0
OVERHEAD_BOUND_MS = 150.0


def main(
    seconds: Annotated[float, typer.Option(help="Length of each measured stretch.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Stretches of each kind.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs whose overhead is measured.")] = 10,
) -> None:
    """Run all measurements and write the result."""
    rows = [*submitting(seconds, rounds), *reading(seconds * rounds), *overhead(jobs)]
    settings = {
        "clients": CLIENTS,
        "streams": STREAMS,
        "reads_per_s": READS_PER_S,
        "seconds": seconds,
        "rounds": rounds,
        "jobs": jobs,
        "cores": os.cpu_count(),
    }
    document = report.result("serving", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def submitting(seconds: float, rounds: int) -> list[Row]:
    """Alternate between the bare handler and the service; every round starts on the same data."""
    service_rates: list[float] = []
    bare_rates: list[float] = []
    latencies: list[float] = []
    limits = {"SERVICE_MAX_WAITING": "10000000", "SERVICE_RATE": "100000000/minute"}
    with (
        run_cluster(environment=limits) as cluster,
        kept_offer(cluster),
        bare_api(cluster) as bare_port,
    ):
        key = add_key(cluster)
        authorized = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        service_request = load_generator.request_bytes("POST", "/generate", authorized, BODY)
        plain = {"Content-Type": "application/json"}
        bare_request = load_generator.request_bytes("POST", "/generate", plain, BODY)
        service_port = int(cluster.urls[0].rsplit(":", 1)[1])
        start = Snapshot(cluster.redis)
        for number in range(rounds + 1):
            for port, request, rates in (
                (bare_port, bare_request, bare_rates),
                (service_port, service_request, service_rates),
            ):
                start.restore()
                length = seconds if number else 2.0  # the first round is a warm-up
                responses = asyncio.run(
                    load_generator.run_closed_loop(port, request, CLIENTS, length)
                )
                assert set(responses.statuses) == {202}, responses.statuses
                if number:
                    rates.append(len(responses.seconds) / length)
                    if rates is service_rates:
                        latencies += responses.seconds
    return [
        Row(
            f"jobs accepted per second, {CLIENTS} clients (floor {SUBMIT_FLOOR:.0%} of bare)",
            round(statistics.median(service_rates), 1),
            "1/s",
            baseline=round(statistics.median(bare_rates), 1),
        ),
        Row(f"p99 of POST /generate, {CLIENTS} clients", percentile_ms(latencies, 99), "ms"),
    ]


def reading(seconds: float) -> list[Row]:
    """Read one job at a fixed rate, without streams and with 100 that receive events."""
    measured: dict[str, load_generator.Responses] = {}
    worker = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0.25")
    with run_cluster(worker=worker) as cluster:
        running = cluster.submit(prompt="steady", num_inference_steps=1000)
        cluster.wait_for_step(running, 1)
        port = int(cluster.urls[0].rsplit(":", 1)[1])
        read = load_generator.request_bytes("GET", f"/jobs/{running}", {"Connection": "close"})
        follow = load_generator.request_bytes("GET", f"/jobs/{running}/events", {})

        async def measure() -> int:
            await load_generator.run_open_loop(port, read, READS_PER_S, 3.0)
            measured["alone"] = await load_generator.run_open_loop(port, read, READS_PER_S, seconds)
            async with load_generator.open_streams(port, [follow] * STREAMS) as received:
                before = sum(received)
                measured["streams"] = await load_generator.run_open_loop(
                    port, read, READS_PER_S, seconds
                )
                return sum(received) - before

        received_bytes = asyncio.run(measure())
    assert all(set(each.statuses) == {200} for each in measured.values())
    alone, streams = (measured[name].seconds for name in ("alone", "streams"))
    return [
        Row(
            f"p99 of GET /jobs/{{id}}, {STREAMS} streams open (bound {READ_BOUND_MS:g} ms)",
            percentile_ms(streams, 99),
            "ms",
            baseline=percentile_ms(alone, 99),
        ),
        Row(
            f"median of GET /jobs/{{id}}, {STREAMS} streams open",
            percentile_ms(streams, 50),
            "ms",
            baseline=percentile_ms(alone, 50),
        ),
        Row(
            "bytes per second through the streams meanwhile", round(received_bytes / seconds), "B/s"
        ),
    ]


def overhead(jobs: int) -> list[Row]:
    """Measure from sending a request to the event of its success, minus the pipeline's seconds."""
    extra, whole = [], []
    with run_cluster() as cluster, httpx.Client(base_url=cluster.urls[0], timeout=60) as client:
        for number in range(jobs + 1):
            started = time.perf_counter()
            # Each job has its own prompt, because a worker caches embeddings.
            own = {"prompt": f"{PROMPT}, take {number}", "seed": number}
            job_id = client.post("/generate", json=SHORT_JOB | own).json()["id"]
            with client.stream("GET", f"/jobs/{job_id}/events") as events:
                for line in events.iter_lines():
                    if line.startswith("data:") and '"succeeded"' in line:
                        break
            total_s = time.perf_counter() - started
            timings = client.get(f"/jobs/{job_id}").json()["timings"]
            stages = ("text_encoder_s", "denoise_s", "vae_s", "mp4_s")
            if number:
                whole.append(total_s)
                extra.append(total_s - sum(timings[stage] for stage in stages))
    return [
        Row(
            f"overhead of a job, median (bound {OVERHEAD_BOUND_MS:g} ms; baseline: whole job)",
            round(1000 * statistics.median(extra), 1),
            "ms",
            baseline=round(1000 * statistics.median(whole), 1),
        ),
        Row("overhead of a job, worst", round(1000 * max(extra), 1), "ms"),
    ]


@contextmanager
def run_cluster(**options: Any) -> Iterator[Cluster]:
    """Run one API process and one worker in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="wan-bench-") as folder:
        options = {"worker": WORKER, **options}
        with Cluster(Path(folder), apis=1, workers=1, **options) as cluster:
            yield cluster


@contextmanager
def kept_offer(cluster: Cluster) -> Iterator[None]:
    """Kill the worker and keep its offer published, so that jobs stay in the queue."""
    (offer,) = catalog.read(cluster.redis).offers
    cluster.pause_restarts("worker-0")
    cluster.kill("worker-0")
    done = threading.Event()
    thread = threading.Thread(target=_publish_offer, args=(cluster.redis, offer, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _publish_offer(redis: Redis, offer: WorkerOffer, done: threading.Event) -> None:
    while True:
        catalog.publish(redis, offer)
        if done.wait(0.2):  # often, because the database is reset between rounds
            return


@contextmanager
def bare_api(cluster: Cluster) -> Iterator[int]:
    """Run the baseline's server; yields its port."""
    port = find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving.bare_api", str(port)],
        env=os.environ | {"REDIS_URL": f"redis://127.0.0.1:{cluster.valkey_port}/0"},
        # With an access log in a file, like the service: one line per request.
        stdout=(cluster.folder / "logs" / "bare.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: _is_ready(port), 30, "the bare handler answers")
        yield port
    finally:
        process.terminate()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/docs").status_code == 200
    except httpx.TransportError:
        return False


def add_key(cluster: Cluster) -> str:
    """Create a user's API key with the service's command."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "service", "keys", "add", "bench"),
            *("--role", "user", "--quota", "10000000"),
        ],
        env=os.environ | {"REDIS_URL": f"redis://127.0.0.1:{cluster.valkey_port}/0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return next(word for word in done.stdout.split() if word.startswith("wan_"))


class Snapshot:
    """A copy of a small database without offers, which are published again anyway."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        prefix: Any = redis_keys.worker_offer("").encode()
        names = [name for name in self._redis.keys("*") if not name.startswith(prefix)]
        self._values = {name: self._redis.dump(name) for name in names}

    def restore(self) -> None:
        """Reset the database to the copy."""
        self._redis.flushall()
        for name, value in self._values.items():
            self._redis.restore(name, 0, value, replace=True)
        time.sleep(0.5)  # until the offer is published again


def percentile_ms(seconds: list[float], percent: int) -> float:
    """Return a percentile in milliseconds."""
    return round(1000 * statistics.quantiles(seconds, n=100)[percent - 1], 2)


if __name__ == "__main__":
    typer.run(main)
