"""Compare the simulation with a real service: Valkey, one API process and three workers.

The workers' engine sleeps in each step, so that a job takes as long as its steps. First a few jobs
are run to measure what each kind takes, and what a worker needs between two jobs. Then jobs arrive
at random, some of them with priority, and the simulation gets nothing but the moments at which they
were created, and those measured seconds. The CPU time of Valkey is read beside it.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Row
from benchmarks.serving.capacity.queue_model import Arrival, Fleet, simulate
from benchmarks.serving.capacity.waits import percentile
from benchmarks.serving.capacity.workload import Kind, poisson, scaled
from deploy.local.cluster import Cluster
from deploy.local.waiting import wait_until
from service.auth.api_keys import KeyStore, Role

WORKERS: Final = 3
IDLE_S: Final = 20.0
STEPS: Final = {"short": 4, "long": 12}
SHARES: Final = {"short": 0.63, "long": 0.27, "short:priority": 0.07, "long:priority": 0.03}
OTHER_ARRIVALS: Final = 200
"""So many other random arrivals say between which bounds a percentile of so few jobs may lie."""
PERCENTS: Final = (50, 90, 99)


class Service:
    """The real service, and a key for jobs with and one for jobs without priority."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        keys = KeyStore(cluster.redis)
        self._keys = {
            True: keys.add("ops", Role.OPS)[1],
            False: keys.add("user", Role.USER, 100_000)[1],
        }
        self._seeds = iter(range(2**31))

    def submit(self, kind: str, priority: bool) -> str:
        """Ask for a job; return its id."""
        body = {
            "prompt": "a small red circle",
            "num_inference_steps": STEPS[kind],
            "seed": next(self._seeds),
        }
        headers = {"Authorization": f"Bearer {self._keys[priority]}"}
        answer = self._cluster.request("POST", "/generate", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(self, job_ids: Sequence[str], limit_s: float) -> list[dict[str, Any]]:
        """Wait until all jobs have ended, and read them; RQ's count is cheap to ask for."""

        def done() -> bool:
            redis: Any = self._cluster.redis
            return not redis.zcard("wan:jobs:queued") and not redis.zcard("wan:jobs:running")

        wait_until(done, limit_s, "all jobs end", self._cluster.logs)
        headers = {"Authorization": f"Bearer {self._keys[True]}"}
        jobs = []
        for job_id in job_ids:
            job = self._cluster.request("GET", f"/jobs/{job_id}", headers=headers).json()
            assert job["state"] == "succeeded", job
            jobs.append(job | {"worker": self._cluster.record(job_id)["worker"]})
        return jobs

    def valkey_cpu_s(self) -> float:
        """Read the CPU seconds that Valkey has used."""
        redis: Any = self._cluster.redis
        found = redis.info("cpu")
        return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


def run_check(jobs: int, load: float, step_s: float, seed: int) -> list[Row]:
    """Run the load, simulate the same arrivals, and return both."""
    engine = (sys.executable, "-m", "benchmarks.serving.fake_worker", str(step_s))
    limits = {"SERVICE_MAX_WAITING": str(10 * jobs), "SERVICE_RATE": "1000000/minute"}
    with (
        tempfile.TemporaryDirectory(prefix="wan-bench-") as folder,
        Cluster(
            Path(folder), apis=1, workers=WORKERS, worker=engine, environment=limits
        ) as cluster,
    ):
        service = Service(cluster)
        alone = [service.submit(kind, False) for _ in range(3 * WORKERS) for kind in STEPS]
        seconds, between_s = measured(service.ended(alone, 300))
        idle_cpu = _cpu_while_idle(service)
        kinds = [
            Kind(name, share, seconds[name.split(":")[0]], name.endswith(":priority"))
            for name, share in SHARES.items()
        ]
        kinds = scaled(kinds, WORKERS, load, between_s)
        cpu_s, started = service.valkey_cpu_s(), time.monotonic()
        found = service.ended(_send(service, poisson(kinds, jobs, seed)), 600)
        cpu_s, took_s = service.valkey_cpu_s() - cpu_s, time.monotonic() - started
    fleet = Fleet(WORKERS, between_s)
    rows = [
        *(Row(f"a {kind} job alone", round(each, 3), "s") for kind, each in seconds.items()),
        Row("a worker between two jobs", round(between_s, 3), "s"),
        *compared(found, seconds, fleet, kinds, seed),
        Row("Valkey's CPU, three idle workers and a service", round(1000 * idle_cpu, 2), "ms/s"),
        Row(
            "Valkey's CPU for a job, without what idle workers take",
            round(1000 * (cpu_s - idle_cpu * took_s) / jobs, 2),
            "ms",
        ),
    ]
    return rows


def measured(jobs: Iterable[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Return the mean seconds of each kind of job, and of a worker between two that both waited."""
    seconds, by_worker = defaultdict(list), defaultdict(list)
    for job in jobs:
        seconds[_kind(job)].append(_at(job, "finished_at") - _at(job, "started_at"))
        by_worker[job["worker"]].append((_at(job, "started_at"), _at(job, "finished_at")))
    gaps = []
    for times in by_worker.values():
        times.sort()
        gaps += [later[0] - earlier[1] for earlier, later in itertools.pairwise(times)]
    return {kind: statistics.fmean(each) for kind, each in seconds.items()}, statistics.fmean(gaps)


def compared(
    jobs: Sequence[dict[str, Any]],
    seconds: dict[str, float],
    fleet: Fleet,
    kinds: Sequence[Kind],
    seed: int,
) -> list[Row]:
    """Return the waits of the real jobs, beside those of the same arrivals in the simulation, and
    with the range of 95 % of other random arrivals as the interval.
    """
    jobs = sorted(jobs, key=lambda job: str(job["id"]))
    arrivals = [Arrival(_at(j, "created_at"), seconds[_kind(j)], j["priority"]) for j in jobs]
    real = [_at(job, "started_at") - _at(job, "created_at") for job in jobs]
    same = simulate(arrivals, fleet).waits_s
    others = [
        simulate(poisson(kinds, len(jobs), number), fleet).waits_s
        for number in range(seed + 1, seed + 1 + OTHER_ARRIVALS)
    ]
    busy_s = sum(_at(job, "finished_at") - _at(job, "started_at") for job in jobs)
    span_s = max(_at(j, "finished_at") for j in jobs) - min(_at(j, "created_at") for j in jobs)
    rows = [Row("utilization of the workers", round(busy_s / fleet.cards / span_s, 3), "1")]
    groups = {"all": (True, False), "with priority": (True,), "without priority": (False,)}
    for name, which in groups.items():
        chosen = [number for number, job in enumerate(jobs) if job["priority"] in which]
        for percent in PERCENTS if name == "all" else (50, 90):
            values = [percentile([each[n] for n in chosen], percent) for each in (real, same)]
            rows.append(
                Row(
                    f"wait of jobs, {name}, p{percent} (baseline: simulated)",
                    round(values[0], 3),
                    "s",
                    baseline=round(values[1], 3),
                    **(_range(others, percent) if name == "all" else {}),
                )
            )
    errors = [abs(a - b) for a, b in zip(real, same, strict=True)]
    rows.append(Row("difference of a job's wait, mean", round(statistics.fmean(errors), 3), "s"))
    return rows


def _range(others: Sequence[Sequence[float]], percent: int) -> dict[str, float]:
    found = [percentile(each, percent) for each in others]
    return {"low": round(percentile(found, 2.5), 3), "high": round(percentile(found, 97.5), 3)}


def _send(service: Service, arrivals: Sequence[Arrival]) -> list[str]:
    """Ask for each job when it is due."""
    started = time.monotonic()
    job_ids = []
    for arrival in arrivals:
        time.sleep(max(0.0, started + arrival.at_s - time.monotonic()))
        job_ids.append(service.submit(arrival.name.split(":")[0], arrival.priority))
    return job_ids


def _cpu_while_idle(service: Service) -> float:
    cpu_s, started = service.valkey_cpu_s(), time.monotonic()
    time.sleep(IDLE_S)
    return (service.valkey_cpu_s() - cpu_s) / (time.monotonic() - started)


def _kind(job: dict[str, Any]) -> str:
    steps = job["request"]["num_inference_steps"]
    return next(kind for kind, number in STEPS.items() if number == steps)


def _at(job: dict[str, Any], name: str) -> float:
    return datetime.fromisoformat(job[name]).timestamp()
