"""Serve jobs until asked to stop, across losses of Redis, with the model loaded once."""

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

MAX_PAUSE_S = 10.0
"""Longest pause before a worker starts again. There is no limit to the number of attempts."""

HEALTHY_AFTER_S = 60.0
"""After a worker has served this long, the next pause is a short one again."""

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class ServeContext:
    """The objects that are made once and outlive every loss of Redis."""

    engine: Engine
    redis: Redis
    artifacts: ArtifactStore


def serve(context: ServeContext, settings: WorkerSettings, ids: WorkerIds) -> int:
    """Run one `ResidentWorker` after another; return the status to end the process with."""
    stats, drain, backoff = WorkerStats(), Drain(settings.drain), Backoff(MAX_PAUSE_S)
    while not _should_end(stats, drain):
        started = time.monotonic()
        try:
            worker = ResidentWorker(
                context.engine,
                context.redis,
                context.artifacts,
                stats,
                drain,
                settings.stall_limits,
            )
            worker.ready_file = settings.ready_file
            ids.worker_id = worker.name
            worker.work(logging_level="WARNING")
        except RedisError as error:
            stats.outage.mark_down(error)
        if time.monotonic() - started > HEALTHY_AFTER_S:
            backoff.reset()
        _wait(backoff.next_s(), stats, drain)
    return stats.exit_status or 0


def _wait(seconds: float, stats: WorkerStats, drain: Drain) -> None:
    """Sleep in short pieces, since a signal does not end a sleep."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _should_end(stats, drain):
        time.sleep(_POLL_S)


def _should_end(stats: WorkerStats, drain: Drain) -> bool:
    return drain.stopping or stats.exit_status is not None
