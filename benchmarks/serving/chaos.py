"""Kill processes and break what they need, at random: `python -m benchmarks.serving.chaos`.

Two API processes, two workers with the shipped miniature and one Valkey are killed (SIGKILL) at
random and restarted, while callers keep submitting short jobs. Between the kills Valkey is full or
read-only for a while or forgets its scripts, the share of a worker's artifact store or its ffmpeg
is away for a while, or its scratch folder is removed; several of these may last at once, and kills
go on meanwhile. Afterwards every accepted job is checked: it must have ended exactly once, not
failed for a worker's fault, and its video must be complete.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/. The
exit status is 1 if a job was lost, ended twice, failed for a worker's fault or has a broken video,
or if a process was left behind. Only root can unmount a share; others leave that fault out.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from redis.exceptions import RedisError

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving.faulty_host import FaultyHost, Share
from deploy.local.cluster import ENDED, WORKER, Cluster
from deploy.local.ports import LOOPBACK
from deploy.local.waiting import wait_until

SHORT = {"prompt": "a small red circle", "num_frames": 5, "num_inference_steps": 2}
KILLED = {"worker-0": 3, "worker-1": 3, "api-0": 2, "api-1": 2, "valkey": 2}
"""The processes to kill, with the weights of their random choice."""

FAULTS = {
    "redis-full": (1, (2.0, 8.0)),
    "redis-read-only": (1, (2.0, 8.0)),
    "scripts-forgotten": (1, (0.0, 0.0)),
    "store-missing": (2, (5.0, 45.0)),
    "scratch-removed": (2, (0.0, 0.0)),
    "ffmpeg-broken": (1, (3.0, 20.0)),
}
"""The other faults, with their weights beside those of the kills, and how many seconds they last.
A store is missing for less or more than the half minute for which storing is retried."""

THE_JOBS_OWN = "worker_lost"
"""The only code of a failure that may be a job's: the two kills that it takes may be its doing."""

PAUSE_S = (2.0, 7.0)
"""The shortest and longest pause between two events: less and more than a worker's restart."""

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
    unfit: list[str] = field(default_factory=list)
    unnamed_files: int = 0
    seconds: list[float] = field(default_factory=list)


class Host(FaultyHost):
    """The host of one worker, whose share can be unmounted if this user may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.share = Share(folder / "share") if Share.can_mount() else None

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | (self.share.environment if self.share else {})


class Chaos:
    """Draws kills and faults at random; counts how often each was."""

    def __init__(self, cluster: Cluster, hosts: Sequence[Host], rng: random.Random) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._rng = rng
        self.killed: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self._ends: dict[str, tuple[float, Callable[[], object]]] = {}

    def run(self, kills: int) -> None:
        """Go on until so many processes were killed, then end the faults that still last."""
        weights = KILLED | {name: weight for name, (weight, _) in FAULTS.items()}
        if self._hosts[0].share is None:
            del weights["store-missing"]
        try:
            while self.killed.total() < kills:
                self._wait(self._rng.uniform(*PAUSE_S))
                (drawn,) = self._rng.choices(list(weights), list(weights.values()))
                if drawn in KILLED:
                    self._kill(drawn)
                elif drawn not in self._ends:
                    self._begin(drawn)
        finally:
            for end in [each for _, each in self._ends.values()]:
                end()

    def _wait(self, seconds: float) -> None:
        """Sleep, and end the faults whose time is over."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            for name in [name for name, (over_at, _) in self._ends.items() if over_at <= now]:
                self._ends.pop(name)[1]()
            time.sleep(0.1)

    def _kill(self, name: str) -> None:
        try:
            self._cluster.kill(name)
        except ProcessLookupError:
            return  # it has just ended by itself and will be restarted
        self.killed[name.partition("-")[0]] += 1
        print(f"kill {self.killed.total()}: {name}", file=sys.stderr)

    def _begin(self, name: str) -> None:
        host = self._rng.choice(self._hosts)
        seconds = self._rng.uniform(*FAULTS[name][1])
        redis, store = self._cluster.redis, self._cluster.artifacts
        end: Callable[[], object] | None = None
        match name:
            case "redis-full":
                self._tell_redis(lambda: redis.config_set("maxmemory", 1))
                end = lambda: self._tell_redis(lambda: redis.config_set("maxmemory", 0))  # noqa: E731
            case "redis-read-only":
                self._tell_redis(lambda: redis.replicaof(LOOPBACK, 1))  # nothing is there
                end = lambda: self._tell_redis(lambda: redis.replicaof("NO", "ONE"))  # noqa: E731
            case "scripts-forgotten":
                self._tell_redis(redis.script_flush)
            case "store-missing":
                share = host.share
                assert share is not None, "it is not drawn without"
                share.unmount()
                end = lambda: share.mount(store)  # noqa: E731
            case "scratch-removed":
                host.remove_scratch()
            case "ffmpeg-broken":
                host.break_ffmpeg()
                end = host.mend
        self.faults[name] += 1
        print(f"{name} for {seconds:.1f} s", file=sys.stderr)
        if end is not None:
            self._ends[name] = (time.monotonic() + seconds, end)

    def _tell_redis(self, call: Callable[[], object]) -> None:
        """Repeat a command until Valkey takes it, which may have been killed just now."""

        def answered() -> bool:
            try:
                call()
            except RedisError:
                return False
            return True

        wait_until(answered, 60, "Valkey answers", self._cluster.logs, every_s=0.2)


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many processes to kill.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the random events and pauses.")] = 1,
    fake_step_s: Annotated[
        float | None,
        typer.Option(
            help="Run workers whose engine only sleeps, for so long at each step, instead of the "
            "miniature: on a busy machine that would hardly come to run a job."
        ),
    ] = None,
) -> None:
    """Kill processes and break things at random, then check every job."""
    fake = (sys.executable, "-m", "benchmarks.serving.fake_worker", str(fake_step_s))
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="wan-chaos-") as temporary:
        folder = Path(temporary)
        hosts = [Host(folder / f"host-{number}") for number in range(2)]
        cluster = Cluster(
            folder / "cluster",
            worker=WORKER if fake_step_s is None else fake,
            environment={"SERVICE_MAX_WAITING": "1000"},
            own_environments={f"worker-{n}": host.environment for n, host in enumerate(hosts)},
        )
        chaos = Chaos(cluster, hosts, random.Random(seed))
        with _mounted(hosts, cluster.artifacts), cluster:
            done = threading.Event()
            caller = threading.Thread(target=_submit_until, args=(cluster, tally, done))
            caller.start()
            started = time.monotonic()
            try:
                chaos.run(kills)
            finally:
                done.set()
                caller.join()
            chaos_s = time.monotonic() - started
            cluster.wait_until_ready(300)
            settled_s = _wait_for_all(cluster, tally)
            _check(cluster, tally)
        orphans = cluster.orphans()
    rows = _rows(tally, chaos, chaos_s, settled_s, len(orphans))
    settings = {"kills": kills, "seed": seed, "pause_s": PAUSE_S, "job": SHORT} | {
        "fake_step_s": fake_step_s,
        "weights": KILLED | {name: weight for name, (weight, _) in FAULTS.items()},
        "ends": dict(tally.states),
        "codes": dict(tally.codes),
        "attempts": {str(n): count for n, count in sorted(tally.attempts.items())},
        "victims": dict(chaos.killed),
        "faults": dict(chaos.faults),
    }
    name = "chaos" if fake_step_s is None else "chaos-fake-engine"
    document = report.result(name, "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))
    if tally.lost or tally.doubled or tally.broken or tally.unfit or orphans:
        sys.exit(
            f"lost {tally.lost}, doubled {tally.doubled}, broken {tally.broken}, "
            f"failed for a worker's fault {tally.unfit}, {orphans}"
        )


@contextmanager
def _mounted(hosts: Sequence[Host], store: Path) -> Iterator[None]:
    shares = [host.share for host in hosts if host.share is not None]
    try:
        for share in shares:
            share.mount(store)
        yield
    finally:
        for share in shares:
            share.unmount_all()


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

    return wait_until(all_ended, 300, "the last jobs end", cluster.logs, every_s=0.5)


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
            if job["failure"]["code"] != THE_JOBS_OWN:
                tally.unfit.append(job_id)
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


def _rows(tally: Tally, chaos: Chaos, chaos_s: float, settled_s: float, orphans: int) -> list[Row]:
    return [
        Row("kills", float(chaos.killed.total()), ""),
        Row("other faults", float(chaos.faults.total()), ""),
        Row("jobs accepted", float(len(tally.accepted)), ""),
        Row("jobs lost (bound 0)", float(len(tally.lost)), ""),
        Row("jobs that ended twice (bound 0)", float(len(tally.doubled)), ""),
        Row("jobs that failed for a worker's fault (bound 0)", float(len(tally.unfit)), ""),
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
