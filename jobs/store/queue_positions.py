"""Where waiting jobs stand in their queues, and when they will start.

A start is estimated from what is measured (`jobs/durations.py`) and from what the running jobs say
they have left. The estimate of a queue is kept for a second and looks into its front only, so
places cost little, however long the queue and however many ask.
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

MOST_LOOKED_INTO: Final = 100
"""Behind so many waiting jobs a start is reckoned with their mean."""

KEPT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """`position` jobs go before it; None for seconds that are not known."""

    position: int
    starts_in_s: float | None


@dataclass(frozen=True, slots=True)
class _Starts:
    """The starts of the first places of a queue; each place after `reach` adds `each_s`."""

    reach: int
    each_s: float
    starts_s: tuple[float, ...]

    def of(self, position: int) -> float | None:
        if position < len(self.starts_s):
            return self.starts_s[position]
        if len(self.starts_s) <= self.reach:
            return None
        return self.starts_s[-1] + (position - self.reach) * self.each_s


class QueuePositions:
    """Looks up places. Safe to share between threads; one per process is enough."""

    def __init__(
        self, redis: Redis, most_looked_into: int = MOST_LOOKED_INTO, kept_s: float = KEPT_S
    ) -> None:
        self._redis = redis
        self._read_starts = scripts.load(redis, "starts")
        self._most_looked_into = most_looked_into
        self._kept_s = kept_s
        self._kept: dict[tuple[str, int], tuple[float, _Starts]] = {}

    def of(self, jobs: Iterable[JobRecord], workers: Mapping[str, int]) -> dict[str, QueuePosition]:
        """Find the places of those among `jobs` that wait, by their ids.

        workers: how many live workers serve each queue; one that is left out has none.
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
                    position, None if starts is None else starts.of(position)
                )
        return found

    def at(self, queue: str, position: int, workers: int) -> QueuePosition:
        """Describe a place that is known."""
        starts = self._starts(queue, workers, position)
        return QueuePosition(position, None if starts is None else starts.of(position))

    def _positions(self, jobs: Sequence[JobRecord]) -> Sequence[int | None]:
        if not jobs:
            return ()
        with self._redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.lpos(Queue(job.queue, connection=self._redis).key, job.id)
            positions: Sequence[int | None] = pipe.execute()
        return positions

    def _starts(self, queue: str, workers: int, last: int) -> _Starts | None:
        if workers < 1:
            return None
        now = time.monotonic()
        reach = min(last, self._most_looked_into)
        until, kept = self._kept.get((queue, workers), (0.0, None))
        if kept is not None and now < until and reach <= kept.reach:
            return kept
        each_s, *starts_s = map(float, self._read_starts(queue, workers, reach))
        starts = _Starts(reach, each_s, tuple(starts_s))
        for key, (lapses, _) in list(self._kept.items()):
            if lapses < now:
                self._kept.pop(key, None)
        self._kept[queue, workers] = (now + self._kept_s, starts)
        return starts
