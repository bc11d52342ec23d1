"""How long videos and records are kept."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from jobs.redis_keys import RECORD_TTL_S

BEFORE_REDIS: Final = timedelta(hours=2)
"""Records are deleted this long before Redis would drop them, so that their videos go first."""


class Dated(Protocol):
    """A job, as far as its end depends on it."""

    @property
    def created_at(self) -> datetime: ...

    @property
    def finished_at(self) -> datetime | None: ...


@dataclass(frozen=True, slots=True)
class Keep:
    """For how long after the end of their job: `videos` their file, `jobs` the record with it.

    `orphans` is the age from which a file that no record names is deleted.
    """

    videos: timedelta
    jobs: timedelta
    orphans: timedelta

    def record_until(self, job: Dated) -> datetime:
        """When the job is deleted; one that does not end is kept as long as Redis allows."""
        latest = job.created_at + timedelta(seconds=RECORD_TTL_S) - BEFORE_REDIS
        if job.finished_at is None:
            return latest
        return min(job.finished_at + self.jobs, latest)

    def video_until(self, job: Dated) -> datetime:
        """When the job's video is deleted; at the latest with its record."""
        until = self.record_until(job)
        if job.finished_at is None:
            return until
        return min(job.finished_at + self.videos, until)
