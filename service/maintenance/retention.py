"""Delete videos and records whose retention time is over, and files that no record names.

One of the service processes runs a round, about once an hour. A video and its pictures are
deleted before the record that names them, so a round may be interrupted anywhere: the next round
finds what is left.
"""

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, islice
from typing import Final, cast

from redis import Redis
from redis.exceptions import LockError

from jobs import redis_keys
from jobs.artifacts.keys import StoredArtifact
from jobs.artifacts.store import ArtifactStore
from jobs.errors import ArtifactRefused, ArtifactsUnavailable
from jobs.state import JobState
from jobs.store.deletion import delete_job
from jobs.store.job_store import JobStore
from jobs.store.retention_index import PAGE, RetentionEntry, RetentionIndex
from jobs.store.submission import OPEN_OWNER
from service.auth.api_keys import KeyStore
from service.comparisons import viewing_copies
from service.comparisons.store import ComparisonStore
from service.maintenance.retention_clock import ClockRefused, RetentionClock
from service.schemas.expiry import RetentionPeriods

logger = logging.getLogger(__name__)

EVERY: Final = timedelta(hours=1)
CHECK_EVERY_S: Final = 300.0
"""How often a process checks whether a round is due. If a process ends, another takes over soon."""

LOCK_S: Final = 300.0
"""How long the lock is held by a process that died during a round, at most."""

MAX_FAULTS_IN_A_ROW: Final = 10
"""A round ends if so many files in a row cannot be deleted, because then probably none can be.
Fewer are skipped."""

_NOT_RUNNING = tuple(state for state in JobState if state is not JobState.RUNNING)
_VIDEOS = "videos"
_FILE = re.compile(
    _VIDEOS + r"/([A-Za-z0-9_-]{1,64})/[0-9]+(-[0-9a-f]{8})?"
    r"(\.mp4|-thumbnail\.webp|-spritesheet\.webp)\Z"
)

Deleted = Counter[str]
"""How many were deleted of each kind: videos, jobs, orphans, leftovers."""


class RetentionBusy(Exception):
    """Another process is running a round."""


@dataclass(frozen=True, slots=True)
class _Due:
    """A job or a file that is due to be deleted, and the function that deletes it."""

    kind: str
    name: str
    delete: Callable[[], object]


class _Deletion:
    """Deletes what a round finds due, and records what was deleted and what could not be.

    A file that cannot be deleted does not prevent the deletion of the others; `end` reports it.
    """

    def __init__(self, ending: threading.Event) -> None:
        self.deleted: Deleted = Counter()
        self._ending = ending
        self._failed: list[str] = []
        self._in_a_row = 0
        self._reason = ""

    def delete(self, page: Sequence[_Due]) -> None:
        for due in page:
            if self._ending.is_set():
                return
            try:
                due.delete()
            except (ArtifactsUnavailable, ArtifactRefused) as error:
                self._failed.append(due.name)
                self._reason = error.detail
                self._in_a_row += 1
                if self._in_a_row >= MAX_FAULTS_IN_A_ROW:
                    self.end()
            else:
                self._in_a_row = 0
                self.deleted[due.kind] += 1

    def end(self) -> None:
        """Raise ArtifactsUnavailable if something could not be deleted."""
        if self._failed:
            raise ArtifactsUnavailable(
                f"{len(self._failed)} that are due cannot be deleted, {self._failed[-1]} the last "
                f"of them: {self._reason}"
            )


class Retention:
    """Runs rounds of deletion. Safe to share between threads."""

    def __init__(
        self,
        redis: Redis,
        artifacts: ArtifactStore,
        periods: RetentionPeriods,
        clock: RetentionClock | None = None,
    ) -> None:
        self._redis = redis
        self._clock = clock or RetentionClock(redis)
        self._store = JobStore(redis)
        self._index = RetentionIndex(redis)
        self._artifacts = artifacts
        self._periods = periods

    def run_if_due(self, ending: threading.Event) -> None:
        """Run a round, unless one ended within the last hour or another process is running one.

        Nor is one run while the clocks cannot be believed, which is logged and noted in Redis.
        """
        try:
            now = self._clock.steady_now()
            if not self._redis.exists(redis_keys.RETENTION_DONE):
                self.run(ending, now)
        except ClockRefused as error:
            self._redis.set(redis_keys.RETENTION_REFUSED, str(error), ex=2 * EVERY)
            logger.warning("nothing is deleted: %s", error)
        except RetentionBusy:
            logger.debug("another process does it")

    def run(self, ending: threading.Event, now: datetime | None = None) -> Deleted:
        """Run a round now; once `ending` is set it ends early, and counts as not done.

        Args:
            ending: set when the process is to end.
            now: the time that ages are measured from; by default the current time of Redis.

        Raises:
            ClockRefused: `now` is not given, and the clocks cannot be believed.
            RetentionBusy: another process is running one.
            ArtifactsUnavailable: not everything could be deleted; the message names one file.
        """
        now = now or self._clock.now()
        lock = self._redis.lock(redis_keys.RETENTION_LOCK, timeout=LOCK_S, blocking=False)
        if not lock.acquire():
            raise RetentionBusy
        deletion = _Deletion(ending)
        try:
            # Jobs first: files that they leave behind are orphans, if they are old enough.
            pages = chain(self._expired_jobs(now), self._orphans(now), self._copies(now))
            for page in pages:
                lock.extend(LOCK_S, replace_ttl=True)
                deletion.delete(page)
                if ending.is_set():
                    return deletion.deleted
            deletion.deleted["leftovers"] = self._artifacts.remove_leftovers()
            self._clean_up_indexes(now)
            deletion.end()
            self._redis.set(redis_keys.RETENTION_DONE, now.isoformat(), ex=EVERY)
            self._redis.delete(redis_keys.RETENTION_REFUSED)
        finally:
            with suppress(LockError):  # it expired, and another process has begun a round
                lock.release()
            if deletion.deleted.total():
                logger.info("deleted what is past its time: %s", describe(deletion.deleted))
        return deletion.deleted

    def _expired_jobs(self, now: datetime) -> Iterator[list[_Due]]:
        """Find the jobs that are due, and the videos of others; running jobs are never included."""
        soonest = min(self._periods.videos, self._periods.jobs)
        for state in _NOT_RUNNING:
            for page in self._index.created_before(state, now - soonest):
                yield [due for job in page if (due := self._expired(job, now)) is not None]

    def _expired(self, job: RetentionEntry, now: datetime) -> _Due | None:
        if now >= self._periods.record_until(job):
            return _Due("jobs", job.id, partial(delete_job, self._store, self._artifacts, job.id))
        keys = job.file_keys
        if keys and now >= self._periods.video_until(job):
            return _Due("videos", keys[0], partial(self._delete_video, job.id, keys))
        return None

    def _delete_video(self, job_id: str, keys: Sequence[str]) -> None:
        for key in keys:
            self._artifacts.delete(key)
        self._index.video_deleted(job_id)

    def _orphans(self, now: datetime) -> Iterator[list[_Due]]:
        """Find old files that no record names: of lost attempts, or stored just before a crash."""
        oldest_kept = now - self._periods.orphans
        old = (each for each in self._artifacts.list(_VIDEOS) if each.modified_at < oldest_kept)
        for page in _pages(old):
            files = [(match[1], match[0]) for each in page if (match := _FILE.match(each.key))]
            unreferenced = self._index.unreferenced(files)
            if unreferenced and self._index.is_empty():
                # A Redis that lost its data, or a wrong address, is more likely than 30 days
                # without a job.
                logger.warning("Redis knows of no job at all, so no video is taken for an orphan")
                return
            yield [
                _Due("orphans", key, partial(self._artifacts.delete, key)) for key in unreferenced
            ]

    def _copies(self, now: datetime) -> Iterator[list[_Due]]:
        """Find old copies of comparisons that were deleted while the copies were made.

        Those of a comparison that exists stay, however old they are.
        """
        comparisons = ComparisonStore(self._redis)
        oldest_kept = now - self._periods.orphans
        stored = self._artifacts.list(viewing_copies.PREFIX)
        for page in _pages(each for each in stored if each.modified_at < oldest_kept):
            copies = [(each.key, each.key.split("/")[1]) for each in page]
            gone = {name for name in dict(copies).values() if not comparisons.exists(name)}
            if gone and self._index.is_empty():
                return  # as for videos: Redis has lost its data, or is the wrong one
            yield [
                _Due("orphans", key, partial(self._artifacts.delete, key))
                for key, name in copies
                if name in gone
            ]

    def _clean_up_indexes(self, now: datetime) -> None:
        owners = {OPEN_OWNER, *(key.owner_name for key in KeyStore(self._redis).all())}
        self._index.remove_entries(owners, now - timedelta(seconds=redis_keys.RECORD_TTL_S))
        self._index.clean_registries()


def describe(deleted: Deleted) -> str:
    """Describe how many were deleted of each kind."""
    labels = {
        "videos": "videos",
        "jobs": "jobs with their videos",
        "orphans": "files that no job or comparison names",
        "leftovers": "unfinished files",
    }
    return ", ".join(f"{label}: {deleted[kind]}" for kind, label in labels.items())


def run_requested_deletions(
    redis: Redis, artifacts: ArtifactStore, ending: threading.Event
) -> None:
    """Delete the jobs whose deletion was requested while they ran, and which have ended since."""
    store = JobStore(redis)
    ended = [
        cast("bytes", each).decode() for each in redis.zrange(redis_keys.DELETIONS, 0, PAGE - 1)
    ]
    deletion = _Deletion(ending)
    deletion.delete(
        [_Due("jobs", each, partial(delete_job, store, artifacts, each)) for each in ended]
    )
    deletion.end()


def _pages(stored: Iterator[StoredArtifact]) -> Iterator[list[StoredArtifact]]:
    while page := list(islice(stored, PAGE)):
        yield page
