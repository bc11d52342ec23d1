"""Find the positions of waiting jobs in their queues, and estimate when they will start.

A start is estimated from measured durations (`jobs/durations.py`) and from the time that running
jobs report to have left. The estimate of a queue is cached for a second and examines only its
front, so positions are cheap for any length of the queue and any number of callers.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis import Redis
from rq import Queue

from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store import scripts

MAX_EXAMINED: Final = 100
"""At most so many jobs of a queue are examined; later starts are extrapolated from their mean."""

CACHE_S: Final = 1.0
"""How long the estimate of a queue is cached."""


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """`position` jobs go before this one; `starts_in_s` is None if it cannot be estimated."""

    position: int
    starts_in_s: float | None


@dataclass(frozen=True, slots=True)
class _StartTimes:
    """Estimated starts of a queue's first positions; each one after `examined` adds `each_s`."""

    examined: int
    each_s: float
    starts_s: tuple[float, ...]

    def at(self, position: int) -> float | None:
        if position < len(self.starts_s):
            return self.starts_s[position]
        if len(self.starts_s) <= self.examined:
            return None
        return self.starts_s[-1] + (position - self.examined) * self.each_s


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

        Args:
            workers: how many live workers serve each queue; a missing queue has none.
        """
        queues: dict[str, dict[str, int]] = {}
        waiting = [job for job in jobs if job.state is JobState.QUEUED]
        for job, position in zip(waiting, self._positions(waiting), strict=True):
            if position is not None:
                queues.setdefault(job.queue, {})[job.id] = position
        found: dict[str, QueuePosition] = {}
        for queue, positions in queues.items():
            starts = self._starts(queue, workers.get(queue, 0), max(positions.values()))
            for job_id, position in positions.items():
                found[job_id] = QueuePosition(
                    position, None if starts is None else starts.at(position)
                )
        return found

    def at(self, queue: str, position: int, workers: int) -> QueuePosition:
        """Estimate the start of a position that is already known."""
        starts = self._starts(queue, workers, position)
        return QueuePosition(position, None if starts is None else starts.at(position))

    def _positions(self, jobs: Sequence[JobRecord]) -> Sequence[int | None]:
        if not jobs:
            return ()
        with self._redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.lpos(Queue(job.queue, connection=self._redis).key, job.id)
            positions: Sequence[int | None] = pipe.execute()
        return positions

    def _starts(self, queue: str, workers: int, last: int) -> _StartTimes | None:
        if workers < 1:
            return None
        now = time.monotonic()
        examined = min(last, self._max_examined)
        expires, cached = self._cached.get((queue, workers), (0.0, None))
        if cached is not None and now < expires and examined <= cached.examined:
            return cached
        each_s, *starts_s = map(float, self._read_starts(queue, workers, examined))
        starts = _StartTimes(examined, each_s, tuple(starts_s))
        for key, (expires, _) in list(self._cached.items()):
            if expires < now:
                self._cached.pop(key, None)
        self._cached[queue, workers] = (now + self._cache_s, starts)
        return starts
