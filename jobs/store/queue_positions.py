"""Find the positions of waiting jobs in their queues, and estimate when they will start.

A start is estimated from measured durations (`jobs/durations.py`) and from the time that running
jobs report to have left. The estimate of a queue is cached for a second, or until a job starts or
ends, and examines only its front. So positions are cheap for any length of the queue and any number
of callers.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis import Redis
from rq import Queue

from jobs import redis_keys
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store import scripts

MAX_EXAMINED: Final = 100
"""At most so many jobs of a queue are examined; later starts are extrapolated from their mean."""

CACHE_S: Final = 1.0
"""How long the estimate of a queue is cached."""


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """`position` jobs of the queue run or wait before this one.

    `starts_in_s` is None if it cannot be estimated.
    """

    position: int
    starts_in_s: float | None


@dataclass(frozen=True, slots=True)
class _StartTimes:
    """Estimated starts of a queue's first places; each one after `examined` adds `each_s`.

    `busy` jobs run, or are being taken by a worker. The starts are empty without any estimate.
    """

    counts: Sequence[int]
    examined: int
    busy: int
    each_s: float
    starts_s: tuple[float, ...]

    def at(self, waiting: int) -> QueuePosition:
        return QueuePosition(self.busy + waiting, self._start_s(waiting))

    def _start_s(self, waiting: int) -> float | None:
        if waiting < len(self.starts_s):
            return self.starts_s[waiting]
        if len(self.starts_s) <= self.examined:
            return None
        return self.starts_s[-1] + (waiting - self.examined) * self.each_s


class QueuePositions:
    """Looks up positions. Safe to share between threads; one per process is enough."""

    def __init__(
        self, redis: Redis, max_examined: int = MAX_EXAMINED, cache_s: float = CACHE_S
    ) -> None:
        self._redis = redis
        self._read_starts = scripts.load(redis, "starts")
        self._max_examined = max_examined
        self._cache_s = cache_s
        self._cached: dict[tuple[str, int], tuple[float, _StartTimes]] = {}

    def of(self, jobs: Iterable[JobRecord], workers: Mapping[str, int]) -> dict[str, QueuePosition]:
        """Find the positions of the waiting jobs among `jobs`, by their ids.

        A job that a worker has just taken is at 0, and starts now.

        Args:
            workers: how many live workers serve each queue; a missing queue has none.
        """
        queues: dict[str, dict[str, int]] = {}
        found: dict[str, QueuePosition] = {}
        waiting = [job for job in jobs if job.state is JobState.QUEUED]
        for job, position in zip(waiting, self._positions(waiting), strict=True):
            if position is None:
                found[job.id] = QueuePosition(0, 0.0)
            else:
                queues.setdefault(job.queue, {})[job.id] = position
        for queue, positions in queues.items():
            starts = self._starts(queue, workers.get(queue, 0), max(positions.values()))
            found |= {job_id: starts.at(position) for job_id, position in positions.items()}
        return found

    def at(self, queue: str, waiting: int, workers: int) -> QueuePosition:
        """Find the position of a job behind so many waiting ones."""
        return self._starts(queue, workers, waiting).at(waiting)

    def _positions(self, jobs: Sequence[JobRecord]) -> Sequence[int | None]:
        if not jobs:
            return ()
        with self._redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.lpos(Queue(job.queue, connection=self._redis).key, job.id)
            positions: Sequence[int | None] = pipe.execute()
        return positions

    def _counts(self, queue: str) -> Sequence[int]:
        """Count what changes when a job is taken, starts or ends, but not when one is queued."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.zcard(redis_keys.index(JobState.RUNNING))
            pipe.zcard(redis_keys.index(JobState.QUEUED))
            pipe.llen(Queue(queue, connection=self._redis).key)
            running, queued, in_list = pipe.execute()
        return running, queued - in_list

    def _starts(self, queue: str, workers: int, last: int) -> _StartTimes:
        now = time.monotonic()
        examined = min(last, self._max_examined)
        counts = self._counts(queue)
        expires, cached = self._cached.get((queue, workers), (0.0, None))
        if (
            cached is not None
            and now < expires
            and examined <= cached.examined
            and cached.counts == counts
        ):
            return cached
        busy, each_s, *starts_s = map(float, self._read_starts(queue, workers, examined))
        starts = _StartTimes(counts, examined, int(busy), each_s, tuple(starts_s))
        for key, (expires, _) in list(self._cached.items()):
            if expires < now:
                self._cached.pop(key, None)
        self._cached[queue, workers] = (now + self._cache_s, starts)
        return starts
