"""What a job needs besides its id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from jobs.artifacts.store import ArtifactStore
from jobs.store.job_store import JobStore
from worker.interface import Engine
from worker.process.drain import Drain, JobInHand
from worker.process.stats import WorkerStats
from worker.settings import StallLimits


@dataclass(frozen=True, slots=True)
class JobContext:
    """Where one job is run: by which worker, with what, and under which rules.

    Attributes:
        scratch: a folder for unfinished files.
        job: the delivery at hand; everything else is the same for every job of the worker.
    """

    worker: str
    engine: Engine
    redis: Redis
    store: JobStore
    artifacts: ArtifactStore
    scratch: Path
    journal: WorkerStats
    drain: Drain
    limits: StallLimits
    job: JobInHand
