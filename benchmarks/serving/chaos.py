"""Kill processes at random under a load of jobs: `python -m benchmarks.serving.chaos --kills 100`.

Two API processes, two workers with the shipped miniature and one Valkey are killed (SIGKILL) at
random and restarted, while callers keep submitting short jobs. Afterwards every accepted job is
checked: it must have ended exactly once, and its video must be complete.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/. The
exit status is 1 if a job was lost, ended twice or has a broken video, or if a process was left
behind.
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
"""The processes to kill, with the weights of their random choice."""

PAUSE_S = (2.0, 7.0)
"""The shortest and longest pause between two kills: less and more than a worker's restart takes."""

MAX_OPEN_JOBS = 6
"""Callers submit while fewer jobs than this are queued or running."""


@dataclass(slots=True)
class Tally:
    """The accepted jobs, and what became of them."""

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
    seed: Annotated[int, typer.Option(help="Seed of the random processes and pauses.")] = 1,
) -> None:
    """Kill processes at random, then check every job."""
    tally = Tally()
    victims: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="wan-chaos-") as folder:
        cluster = Cluster(Path(folder), environment={"SERVICE_MAX_WAITING": "1000"})
        with cluster:
            done = threading.Event()
            caller = threading.Thread(target=_submit_until, args=(cluster, tally, done))
            caller.start()
            started = time.monotonic()
            try:
                _kill_at_random(cluster, random.Random(seed), kills, victims)
            finally:
                done.set()
                caller.join()
            chaos_s = time.monotonic() - started
            cluster.wait_until_ready()
            settled_s = _wait_for_all(cluster, tally)
            _check(cluster, tally)
        orphans = cluster.orphans()
    rows = _rows(tally, victims, chaos_s, settled_s, len(orphans))
    settings = {"kills": kills, "seed": seed, "pause_s": PAUSE_S, "job": SHORT} | {
        "ends": dict(tally.states),
        "codes": dict(tally.codes),
        "attempts": {str(n): count for n, count in sorted(tally.attempts.items())},
        "victims": dict(victims),
    }
    document = report.result("chaos", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))
    if tally.lost or tally.doubled or tally.broken or orphans:
        sys.exit(f"lost {tally.lost}, doubled {tally.doubled}, broken {tally.broken}, {orphans}")


def _kill_at_random(
    cluster: Cluster, rng: random.Random, kills: int, victims: collections.Counter[str]
) -> None:
    for number in range(kills):
        time.sleep(rng.uniform(*PAUSE_S))
        (victim,) = rng.choices(list(TARGETS), list(TARGETS.values()))
        try:
            cluster.kill(victim)
        except ProcessLookupError:
            continue  # it has just ended by itself and will be restarted
        victims[victim.partition("-")[0]] += 1
        print(f"kill {number + 1}: {victim}", file=sys.stderr)


def _submit_until(cluster: Cluster, tally: Tally, done: threading.Event) -> None:
    """Keep a few jobs open, until `done` is set."""
    open_jobs: list[str] = []
    while not done.is_set():
        if len(open_jobs) < MAX_OPEN_JOBS:
            number = len(tally.accepted)
            prompt = f"{SHORT['prompt']}, take {number}"  # a worker caches embeddings
            job_id = cluster.submit(**SHORT | {"prompt": prompt}, seed=number)
            tally.accepted.append(job_id)
            open_jobs.append(job_id)
        else:
            time.sleep(0.5)
            open_jobs = [each for each in open_jobs if cluster.job(each)["state"] not in ENDED]


def _wait_for_all(cluster: Cluster, tally: Tally) -> float:
    """Wait until the last accepted jobs have ended; return the seconds that took."""

    def all_ended() -> bool:
        return all(cluster.job(job_id)["state"] in ENDED for job_id in tally.accepted[-50:])

    return wait_until(all_ended, 180, "the last jobs end", cluster.logs, every_s=0.5)


def _check(cluster: Cluster, tally: Tally) -> None:
    for job_id in tally.accepted:
        response = cluster.request("GET", f"/jobs/{job_id}")
        job: dict[str, Any] = response.json()
        if response.status_code != 200 or job["state"] not in ENDED:
            tally.lost.append(job_id)
            continue
        tally.states[job["state"]] += 1
        tally.attempts[job["attempts"]] += 1
        if job["failure"]:
            tally.codes[job["failure"]["code"]] += 1
        if cluster.end_states(job_id) != [job["state"]]:
            tally.doubled.append(job_id)
        files = list((cluster.artifacts / "videos" / job_id).glob("*.mp4"))
        if job["state"] == "succeeded":
            content = cluster.request("GET", f"/jobs/{job_id}/video.mp4").content
            if hashlib.sha256(content).hexdigest() != job["video"]["sha256"]:
                tally.broken.append(job_id)
            if job["attempts"] == 1:
                tally.seconds.append(job["timings"]["total_s"])
        tally.unnamed_files += len(files) - (job["state"] == "succeeded")


def _rows(
    tally: Tally, victims: collections.Counter[str], chaos_s: float, settled_s: float, orphans: int
) -> list[Row]:
    return [
        Row("kills", float(victims.total()), ""),
        Row("jobs accepted", float(len(tally.accepted)), ""),
        Row("jobs lost (bound 0)", float(len(tally.lost)), ""),
        Row("jobs that ended twice (bound 0)", float(len(tally.doubled)), ""),
        Row("videos that are not whole (bound 0)", float(len(tally.broken)), ""),
        Row("orphan processes (bound 0)", float(orphans), ""),
        Row("jobs begun more than once", float(sum(n > 1 for n in tally.attempts.elements())), ""),
        Row("jobs given up after two lost workers", float(tally.codes["worker_lost"]), ""),
        Row("files no record names (left to the retention sweep)", float(tally.unnamed_files), ""),
        Row("median of an undisturbed job", round(statistics.median(tally.seconds), 2), "s"),
        Row("length of the chaos", round(chaos_s, 1), "s"),
        Row("last kill to last end", round(settled_s, 1), "s"),
    ]


if __name__ == "__main__":
    typer.run(main)
