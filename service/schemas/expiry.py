"""Compute when videos and records are deleted."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from jobs.redis_keys import RECORD_TTL_S

BEFORE_REDIS: Final = timedelta(hours=2)
"""Records are deleted this long before Redis would drop them, so that their videos are deleted
first."""


class Dated(Protocol):
    """The times of a job that its retention depends on."""

    @property
    def created_at(self) -> datetime: ...

    @property
    def finished_at(self) -> datetime | None: ...


@dataclass(frozen=True, slots=True)
class RetentionPeriods:
    """The times for which videos, records and orphans are kept.

    Attributes:
        videos: the time from the end of a job to the deletion of its video.
        jobs: the time from the end of a job to the deletion of its record and its video.
        orphans: the age at which a file that no record names is deleted.
    """

    videos: timedelta
    jobs: timedelta
    orphans: timedelta

    def record_until(self, job: Dated) -> datetime:
        """Return when the job is deleted; while it has not ended, as late as Redis allows."""
        latest = job.created_at + timedelta(seconds=RECORD_TTL_S) - BEFORE_REDIS
        if job.finished_at is None:
            return latest
        return min(job.finished_at + self.jobs, latest)

    def video_until(self, job: Dated) -> datetime:
        """Return when the job's video is deleted, at the latest with its record."""
        until = self.record_until(job)
        if job.finished_at is None:
            return until
        return min(job.finished_at + self.videos, until)
