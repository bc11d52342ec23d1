"""Where waiting jobs stand in their queues, and when they will start.

A start is estimated from what is measured (`jobs/pace.py`) and from what the running jobs say they
have left. One call costs little, however long the queue: see `MOST_LOOKED_INTO`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from redis import Redis

from jobs import scripts
from jobs.record import JobRecord
from jobs.state import JobState

MOST_LOOKED_INTO: Final = 100
"""Behind so many waiting jobs a start is reckoned with their mean."""


@dataclass(frozen=True, slots=True)
class Place:
    """`position` jobs go before it; None for seconds that are not known."""

    position: int
    starts_in_s: float | None


class Places:
    """Looks up places. Safe to share between threads."""

    def __init__(self, redis: Redis, most_looked_into: int = MOST_LOOKED_INTO) -> None:
        self._places = scripts.load(redis, "places")
        self._most_looked_into = most_looked_into

    def of(self, jobs: Iterable[JobRecord], workers: Mapping[str, int]) -> dict[str, Place]:
        """Find the places of those among `jobs` that wait, by their ids.

        workers: how many live workers serve each queue; one that is left out has none.
        """
        waiting: dict[str, list[str]] = {}
        for job in jobs:
            if job.state is JobState.QUEUED:
                waiting.setdefault(job.queue, []).append(job.id)
        found: dict[str, Place] = {}
        for queue, ids in waiting.items():
            answer = self._places(queue, workers.get(queue, 0), self._most_looked_into, *ids)
            for job_id, (position, seconds) in zip(ids, answer, strict=True):
                if position >= 0:
                    found[job_id] = Place(position, float(seconds) if seconds else None)
        return found
