"""Define the context of a job: the objects and limits that it runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from jobs.artifacts.store import ArtifactStore
from jobs.store.job_store import JobStore
from worker.interface import Engine
from worker.process.drain import CurrentJob, Drain
from worker.process.stats import WorkerStats
from worker.settings import StallLimits


@dataclass(frozen=True, slots=True)
class JobContext:
    """The context of one job: the worker's name, its resources and its limits.

    Attributes:
        worker: the worker's name.
        scratch: a folder for unfinished files.
        job: the current delivery; everything else is the same for all jobs of the worker.
    """

    worker: str
    engine: Engine
    redis: Redis
    store: JobStore
    artifacts: ArtifactStore
    scratch: Path
    stats: WorkerStats
    drain: Drain
    limits: StallLimits
    job: CurrentJob
