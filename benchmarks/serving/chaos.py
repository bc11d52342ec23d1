"""Random kills under a load of short jobs: `python -m benchmarks.serving.chaos --kills 100`.

Two API processes, two workers with the shipped miniature and one Valkey are started again whenever
they end, and are killed (SIGKILL) at random; callers go on submitting. Afterwards the books are
checked: every accepted job has ended, exactly once, and the video it names is whole.

Prints a table, then the result as one line of JSON, and keeps it in benchmarks/results/. Status 1
when a job was lost or ended twice.
"""

import collections
import hashlib
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.report import Row
from deploy.local.cluster import ENDED, Cluster
from deploy.local.waiting import wait_until

SHORT = {"prompt": "a small red circle", "num_frames": 5, "num_inference_steps": 2}
TARGETS = {"worker-0": 3, "worker-1": 3, "api-0": 2, "api-1": 2, "valkey": 2}
"""Who is killed, by weight."""

PAUSE_S = (2.0, 7.0)
"""Between two kills: shorter and longer than a worker takes to come back."""

WAITING = 6
"""Callers submit while fewer jobs than this are under way."""


@dataclass(slots=True)
class Books:
    """What callers were promised, and what they found in the end."""

    accepted: list[str] = field(default_factory=list)
    states: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    attempts: collections.Counter[int] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unnamed_files: int = 0
    seconds: list[float] = field(default_factory=list)


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many processes to kill.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the choice of victims and pauses.")] = 1,
) -> None:
    """Kill at random and check the books."""
    books = Books()
    victims: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="wan-chaos-") as folder:
        cluster = Cluster(Path(folder), environment={"SERVICE_MAX_WAITING": "1000"})
        with cluster:
            done = threading.Event()
            caller = threading.Thread(target=_submit_until, args=(cluster, books, done))
            caller.start()
            started = time.monotonic()
            try:
                _kill_at_random(cluster, random.Random(seed), kills, victims)
            finally:
                done.set()
                caller.join()
            chaos_s = time.monotonic() - started
            cluster.wait_until_ready()
            settled_s = _wait_for_all(cluster, books)
            _check(cluster, books)
        orphans = cluster.orphans()
    rows = _rows(books, victims, chaos_s, settled_s, len(orphans))
    settings = {"kills": kills, "seed": seed, "pause_s": PAUSE_S, "job": SHORT} | {
        "ends": dict(books.states),
        "codes": dict(books.codes),
        "attempts": {str(n): count for n, count in sorted(books.attempts.items())},
        "victims": dict(victims),
    }
    document = report.result("chaos", "cpu", settings, rows)
    report.print_table(rows)
    report.keep(document)
    print(json.dumps(document))
    if books.lost or books.doubled or books.broken or orphans:
        sys.exit(f"lost {books.lost}, doubled {books.doubled}, broken {books.broken}, {orphans}")


def _kill_at_random(
    cluster: Cluster, dice: random.Random, kills: int, victims: collections.Counter[str]
) -> None:
    for number in range(kills):
        time.sleep(dice.uniform(*PAUSE_S))
        (victim,) = dice.choices(list(TARGETS), list(TARGETS.values()))
        try:
            cluster.kill(victim)
        except ProcessLookupError:
            continue  # it has just ended by itself, which the supervisor sees to
        victims[victim.partition("-")[0]] += 1
        print(f"kill {number + 1}: {victim}", file=sys.stderr)


def _submit_until(cluster: Cluster, books: Books, done: threading.Event) -> None:
    """Keep a few jobs under way, as callers do that mind nothing but their own job."""
    open_jobs: list[str] = []
    while not done.is_set():
        if len(open_jobs) < WAITING:
            number = len(books.accepted)
            prompt = f"{SHORT['prompt']}, take {number}"  # a worker keeps what it has encoded
            job_id = cluster.submit(**SHORT | {"prompt": prompt}, seed=number)
            books.accepted.append(job_id)
            open_jobs.append(job_id)
        else:
            time.sleep(0.5)
            open_jobs = [each for each in open_jobs if cluster.job(each)["state"] not in ENDED]


def _wait_for_all(cluster: Cluster, books: Books) -> float:
    """Until every accepted job has ended, or two minutes have passed without any end."""

    def all_ended() -> bool:
        return all(cluster.job(job_id)["state"] in ENDED for job_id in books.accepted[-50:])

    return wait_until(all_ended, 180, "the last jobs end", cluster.logs, every_s=0.5)


def _check(cluster: Cluster, books: Books) -> None:
    for job_id in books.accepted:
        answer = cluster.request("GET", f"/jobs/{job_id}")
        job: dict[str, Any] = answer.json()
        if answer.status_code != 200 or job["state"] not in ENDED:
            books.lost.append(job_id)
            continue
        books.states[job["state"]] += 1
        books.attempts[job["attempts"]] += 1
        if job["failure"]:
            books.codes[job["failure"]["code"]] += 1
        if cluster.ends(job_id) != [job["state"]]:
            books.doubled.append(job_id)
        files = list((cluster.artifacts / "videos" / job_id).glob("*.mp4"))
        if job["state"] == "succeeded":
            content = cluster.request("GET", f"/jobs/{job_id}/video.mp4").content
            if hashlib.sha256(content).hexdigest() != job["video"]["sha256"]:
                books.broken.append(job_id)
            if job["attempts"] == 1:
                books.seconds.append(job["timings"]["total_s"])
        books.unnamed_files += len(files) - (job["state"] == "succeeded")


def _rows(
    books: Books, victims: collections.Counter[str], chaos_s: float, settled_s: float, orphans: int
) -> list[Row]:
    return [
        Row("kills", float(victims.total()), ""),
        Row("jobs accepted", float(len(books.accepted)), ""),
        Row("jobs lost (bound 0)", float(len(books.lost)), ""),
        Row("jobs that ended twice (bound 0)", float(len(books.doubled)), ""),
        Row("videos that are not whole (bound 0)", float(len(books.broken)), ""),
        Row("orphan processes (bound 0)", float(orphans), ""),
        Row("jobs begun more than once", float(sum(n > 1 for n in books.attempts.elements())), ""),
        Row("jobs given up after two lost workers", float(books.codes["worker_lost"]), ""),
        Row("files no record names (left to the retention sweep)", float(books.unnamed_files), ""),
        Row("median of an undisturbed job", round(statistics.median(books.seconds), 2), "s"),
        Row("length of the chaos", round(chaos_s, 1), "s"),
        Row("last kill to last end", round(settled_s, 1), "s"),
    ]


if __name__ == "__main__":
    typer.run(main)
