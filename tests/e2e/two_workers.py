"""Run two workers, whose engine is a fake, and check that every job has ended once."""

from __future__ import annotations

import collections
import hashlib
import itertools
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from deploy.local.cluster import ENDED, Cluster
from deploy.local.waiting import wait_until

BODY = {"prompt": "a small red circle", "num_inference_steps": 4}


class TwoWorkers(AbstractContextManager["TwoWorkers"]):
    """A cluster of two workers; a job takes a step of `step_s` four times."""

    def __init__(
        self,
        folder: Path,
        own_environments: Mapping[str, Mapping[str, str]],
        *,
        apis: int = 1,
        step_s: float = 0.05,
    ) -> None:
        self.cluster = Cluster(
            folder,
            apis=apis,
            worker=(sys.executable, "-m", "benchmarks.serving.fake_worker", str(step_s)),
            environment={"SERVICE_MAX_WAITING": "100", "SERVICE_QUOTA": "100"},
            own_environments=own_environments,
        )
        self._seeds = itertools.count()

    def __enter__(self) -> Self:
        self.cluster.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.stop()

    def submit(self, count: int) -> list[str]:
        return [self.cluster.submit(**BODY, seed=next(self._seeds)) for _ in range(count)]

    def ended(self, jobs: list[str]) -> int:
        return sum(self.cluster.job(each)["state"] in ENDED for each in jobs)

    def states(self) -> collections.Counter[str]:
        workers = self.cluster.request("GET", "/workers").json()["workers"]
        return collections.Counter(each["state"] for each in workers)

    def wait_until_ended(self, jobs: list[str], least: int | None = None) -> None:
        """Wait until all jobs have ended, or at least so many."""
        least = len(jobs) if least is None else least
        done = lambda: self.ended(jobs) >= least  # noqa: E731
        wait_until(done, 120, f"{least} jobs end", self.cluster.logs, every_s=0.3)

    def check(self, jobs: list[str]) -> collections.Counter[int]:
        """Check that each job ended once, with a whole video; return their numbers of attempts."""
        attempts: collections.Counter[int] = collections.Counter()
        for job_id in jobs:
            job = self.cluster.job(job_id)
            assert job["state"] == "succeeded", (job["failure"], self.cluster.logs())
            assert job["lost"] == 0
            assert self.cluster.end_states(job_id) == ["succeeded"]
            content = self.cluster.request("GET", f"/jobs/{job_id}/video.mp4").content
            assert hashlib.sha256(content).hexdigest() == job["video"]["sha256"]
            attempts[job["attempts"]] += 1
        return attempts

    def returned(self) -> int:
        """Return how many attempts the workers gave back for a fault of theirs."""
        metrics = self.cluster.request("GET", "/metrics").text.splitlines()
        found = [line for line in metrics if line.startswith("wan_attempts_returned_total{")]
        return int(sum(float(line.split()[-1]) for line in found))

    def log(self, name: str) -> str:
        path = self.cluster.folder / "logs" / f"{name}.log"
        return path.read_text(encoding="utf-8")
