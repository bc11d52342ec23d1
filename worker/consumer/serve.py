"""Serve until told to stop, across every loss of Redis, with the model loaded once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import RedisError

from jobs.artifacts.store import ArtifactStore
from worker.consumer.rq_worker import ResidentWorker
from worker.interface import Engine
from worker.process.drain import Drain
from worker.process.logs import WorkerIds
from worker.process.redis_retry import Backoff
from worker.process.stats import WorkerStats
from worker.settings import WorkerSettings

LONGEST_PAUSE_S = 10.0
"""Between two tries to begin again; a worker that loads nothing may be patient for ever."""

SOUND_S = 60.0
"""A worker that served this long was well; the next pause is a short one again."""

_LOOK_UP_S = 0.2


@dataclass(frozen=True, slots=True)
class ServeContext:
    """What is loaded once and outlives every loss of Redis."""

    engine: Engine
    redis: Redis
    artifacts: ArtifactStore


def serve(parts: ServeContext, settings: WorkerSettings, ids: WorkerIds) -> int:
    """Run one `ResidentWorker` after the other; returns the status to end the process with."""
    journal, drain, pauses = WorkerStats(), Drain(settings.drain), Backoff(LONGEST_PAUSE_S)
    while not _over(journal, drain):
        began = time.monotonic()
        try:
            worker = ResidentWorker(
                parts.engine, parts.redis, parts.artifacts, journal, drain, settings.stall_limits
            )
            ids.worker_id = worker.name
            worker.work(logging_level="WARNING")
        except RedisError as error:
            journal.outage.began(error)
        if time.monotonic() - began > SOUND_S:
            pauses.reset()
        _wait(pauses.next_s(), journal, drain)
    return journal.exit_status or 0


def _wait(seconds: float, journal: WorkerStats, drain: Drain) -> None:
    """Look up now and then: a sleep is not cut short by a signal."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not _over(journal, drain):
        time.sleep(_LOOK_UP_S)


def _over(journal: WorkerStats, drain: Drain) -> bool:
    return drain.told or journal.exit_status is not None
