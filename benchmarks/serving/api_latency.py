"""What the front end costs: `python -m benchmarks.serving.api_latency`.

Three questions, each with its baseline in the same run, on one machine:

- submitting: jobs accepted per second by one API process for 32 clients, beside a bare FastAPI
  handler that enqueues the same RQ job. Ours checks the key, its rate and quota, the request
  against the live offers (tokens counted), and writes a durable record with its events.
- reading: the 99th percentile of `GET /jobs/{id}` while 100 event streams are open and fed, beside
  the same with none open.
- a job: from the request to the news of its success, less the seconds the pipeline took.

Prints a table, then the result as one line of JSON, and keeps it in benchmarks/results/.
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
    """Measure the front end."""
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
    report.keep(document)
    print(json.dumps(document))


def submitting(seconds: float, rounds: int) -> list[Row]:
    """Take turns between the bare handler and ours; every stretch starts on the same database."""
    ours: list[float] = []
    bare: list[float] = []
    slow: list[float] = []
    limits = {"SERVICE_MAX_WAITING": "10000000", "SERVICE_RATE": "100000000/minute"}
    with cluster(environment=limits) as site, standing_offer(site), bare_api(site) as bare_port:
        key = add_key(site)
        authorized = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        our_request = load_generator.request_bytes("POST", "/generate", authorized, BODY)
        plain = {"Content-Type": "application/json"}
        bare_request = load_generator.request_bytes("POST", "/generate", plain, BODY)
        our_port = int(site.urls[0].rsplit(":", 1)[1])
        start = Snapshot(site.redis)
        for number in range(rounds + 1):
            for port, request, kept in (
                (bare_port, bare_request, bare),
                (our_port, our_request, ours),
            ):
                start.restore()
                length = seconds if number else 2.0  # the first round warms both up
                answers = asyncio.run(load_generator.hammer(port, request, CLIENTS, length))
                assert set(answers.statuses) == {202}, answers.statuses
                if number:
                    kept.append(len(answers.seconds) / length)
                    if kept is ours:
                        slow += answers.seconds
    return [
        Row(
            f"jobs accepted per second, {CLIENTS} clients (floor {SUBMIT_FLOOR:.0%} of bare)",
            round(statistics.median(ours), 1),
            "1/s",
            baseline=round(statistics.median(bare), 1),
        ),
        Row(f"p99 of POST /generate, {CLIENTS} clients", percentile_ms(slow, 99), "ms"),
    ]


def reading(seconds: float) -> list[Row]:
    """Ask for one job at a steady rate, without streams and with 100 that are being fed."""
    measured: dict[str, load_generator.Answers] = {}
    pattern = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0.25")
    with cluster(worker=pattern) as site:
        running = site.submit(prompt="steady", num_inference_steps=1000)
        site.wait_for_step(running, 1)
        port = int(site.urls[0].rsplit(":", 1)[1])
        read = load_generator.request_bytes("GET", f"/jobs/{running}", {"Connection": "close"})
        follow = load_generator.request_bytes("GET", f"/jobs/{running}/events", {})

        async def measure() -> int:
            await load_generator.ask_regularly(port, read, READS_PER_S, 3.0)
            measured["alone"] = await load_generator.ask_regularly(port, read, READS_PER_S, seconds)
            async with load_generator.streams(port, [follow] * STREAMS) as received:
                before = sum(received)
                measured["streams"] = await load_generator.ask_regularly(
                    port, read, READS_PER_S, seconds
                )
                return sum(received) - before

        fed = asyncio.run(measure())
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
        Row("bytes per second through the streams meanwhile", round(fed / seconds), "B/s"),
    ]


def overhead(jobs: int) -> list[Row]:
    """From sending a request to hearing of its success, less the pipeline's own seconds."""
    extra, whole = [], []
    with cluster() as site, httpx.Client(base_url=site.urls[0], timeout=60) as client:
        for number in range(jobs + 1):
            started = time.perf_counter()
            # A prompt of its own: a worker keeps what it has encoded.
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
def cluster(**options: Any) -> Iterator[Cluster]:
    """One API process and one worker in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="wan-bench-") as folder:
        options = {"worker": WORKER, **options}
        with Cluster(Path(folder), apis=1, workers=1, **options) as site:
            yield site


@contextmanager
def standing_offer(site: Cluster) -> Iterator[None]:
    """Keep the worker's offer in the catalog and end the worker itself: jobs are to pile up."""
    (offer,) = catalog.read(site.redis).offers
    site.hold("worker-0")
    site.kill("worker-0")
    done = threading.Event()
    thread = threading.Thread(target=_repeat, args=(site.redis, offer, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _repeat(redis: Redis, offer: WorkerOffer, done: threading.Event) -> None:
    while True:
        catalog.publish(redis, offer)
        if done.wait(0.2):  # often: the database is put back to its start between stretches
            return


@contextmanager
def bare_api(site: Cluster) -> Iterator[int]:
    port = find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving.bare_api", str(port)],
        env=os.environ | {"REDIS_URL": f"redis://127.0.0.1:{site.valkey_port}/0"},
        # An access log each, into a file: both servers write one line per request.
        stdout=(site.folder / "logs" / "bare.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: _answers(port), 30, "the bare handler answers")
        yield port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/docs").status_code == 200
    except httpx.TransportError:
        return False


def add_key(site: Cluster) -> str:
    """Make a user's key with the service's own command."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "service", "keys", "add", "bench"),
            *("--role", "user", "--quota", "10000000"),
        ],
        env=os.environ | {"REDIS_URL": f"redis://127.0.0.1:{site.valkey_port}/0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return next(word for word in done.stdout.split() if word.startswith("wan_"))


class Snapshot:
    """Everything in a small database, to be put back; offers are left to their own repetition."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        prefix: Any = redis_keys.worker_offer("").encode()
        names = [name for name in self._redis.keys("*") if not name.startswith(prefix)]
        self._kept = {name: self._redis.dump(name) for name in names}

    def restore(self) -> None:
        self._redis.flushall()
        for name, value in self._kept.items():
            self._redis.restore(name, 0, value, replace=True)
        time.sleep(0.5)  # until the offer is back


def percentile_ms(seconds: list[float], percent: int) -> float:
    return round(1000 * statistics.quantiles(seconds, n=100)[percent - 1], 2)


if __name__ == "__main__":
    typer.run(main)
