"""Delete what is past its time: videos, then records, and files that no record names.

Of many service processes one does it, about once an hour. A video is deleted before the record
that names it, so a round may be cut off anywhere: what it leaves, the next one finds.
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

from jobs import record, redis_keys
from jobs.artifacts.keys import Stored
from jobs.artifacts.store import ArtifactStore
from jobs.errors import ArtifactRefused, ArtifactsUnavailable
from jobs.state import JobState
from jobs.store.deletion import delete_job
from jobs.store.job_store import JobStore
from jobs.store.retention_index import PAGE, AgedJob, Aging
from jobs.store.submission import OPEN_OWNER
from service.auth.api_keys import KeyStore
from service.schemas.expiry import Keep

logger = logging.getLogger(__name__)

EVERY: Final = timedelta(hours=1)
ASK_EVERY_S: Final = 300.0
"""How often a process looks whether it is time: if one has gone, another takes over soon."""

LOCK_S: Final = 300.0
"""A process that died during a round holds up the others for this long at most."""

MOST_FAULTS: Final = 10
"""So many files in a row that cannot be deleted mean that none can be; fewer are passed over."""

_NOT_RUNNING = tuple(state for state in JobState if state is not JobState.RUNNING)
_VIDEOS = "videos"
_VIDEO = re.compile(_VIDEOS + r"/([A-Za-z0-9_-]{1,64})/[0-9]+(-[0-9a-f]{8})?\.mp4\Z")

Swept = Counter[str]
"""How much was deleted, by its kind: videos, jobs, orphans, leftovers."""


class RetentionBusy(Exception):
    """Another process is at it."""


@dataclass(frozen=True, slots=True)
class _Due:
    """One thing whose time is over."""

    kind: str
    name: str
    delete: Callable[[], object]


class _Sweep:
    """What a round has deleted, and what it could not.

    One file that cannot be deleted does not keep the others; the round says so at its end.
    """

    def __init__(self, ending: threading.Event) -> None:
        self.swept: Swept = Counter()
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
                if self._in_a_row >= MOST_FAULTS:
                    self.end()
            else:
                self._in_a_row = 0
                self.swept[due.kind] += 1

    def end(self) -> None:
        """Raise ArtifactsUnavailable if something could not be deleted."""
        if self._failed:
            raise ArtifactsUnavailable(
                f"{len(self._failed)} that are due cannot be deleted, {self._failed[-1]} the last "
                f"of them: {self._reason}"
            )


class Retention:
    """Rounds of deleting. Safe to share between threads."""

    def __init__(self, redis: Redis, artifacts: ArtifactStore, keep: Keep) -> None:
        self._redis = redis
        self._store = JobStore(redis)
        self._aging = Aging(redis)
        self._artifacts = artifacts
        self._keep = keep

    def run_if_due(self, ending: threading.Event) -> None:
        """Run a round, unless one ended within the last hour or is under way in another process."""
        if not self._redis.exists(redis_keys.RETENTION_DONE):
            try:
                self.run(ending)
            except RetentionBusy:
                logger.debug("another process does it")

    def run(self, ending: threading.Event, now: datetime | None = None) -> Swept:
        """Run a round now; once `ending` is set it ends early, and counts as not done.

        now: what counts as the present.

        Raises:
            RetentionBusy: another process runs one.
            ArtifactsUnavailable: not everything could be deleted; the sentence names one.
        """
        lock = self._redis.lock(redis_keys.RETENTION_LOCK, timeout=LOCK_S, blocking=False)
        if not lock.acquire():
            raise RetentionBusy
        sweep = _Sweep(ending)
        try:
            now = now or record.now()
            # Jobs first: what they leave behind is an orphan, if it is old enough.
            for page in chain(self._past_jobs(now), self._orphans(now)):
                lock.extend(LOCK_S, replace_ttl=True)
                sweep.delete(page)
                if ending.is_set():
                    return sweep.swept
            sweep.swept["leftovers"] = self._artifacts.remove_leftovers()
            self._tidy(now)
            sweep.end()
            self._redis.set(redis_keys.RETENTION_DONE, now.isoformat(), ex=EVERY)
        finally:
            with suppress(LockError):  # it took too long, and another process has begun
                lock.release()
            if sweep.swept.total():
                logger.info("deleted what is past its time: %s", told(sweep.swept))
        return sweep.swept

    def _past_jobs(self, now: datetime) -> Iterator[list[_Due]]:
        """The jobs whose time is over, or their videos'; running ones are never among them."""
        soonest = min(self._keep.videos, self._keep.jobs)
        for state in _NOT_RUNNING:
            for page in self._aging.created_before(state, now - soonest):
                yield [due for job in page if (due := self._past(job, now)) is not None]

    def _past(self, job: AgedJob, now: datetime) -> _Due | None:
        if now >= self._keep.record_until(job):
            return _Due("jobs", job.id, partial(delete_job, self._store, self._artifacts, job.id))
        key = job.video_key
        if key is not None and now >= self._keep.video_until(job):
            return _Due("videos", key, partial(self._delete_video, job.id, key))
        return None

    def _delete_video(self, job_id: str, key: str) -> None:
        self._artifacts.delete(key)
        self._aging.video_deleted(job_id)

    def _orphans(self, now: datetime) -> Iterator[list[_Due]]:
        """Old files that no record names: of lost attempts, or stored a moment before a crash."""
        oldest_kept = now - self._keep.orphans
        old = (each for each in self._artifacts.list(_VIDEOS) if each.modified_at < oldest_kept)
        for page in _pages(old):
            videos = [(match[1], match[0]) for each in page if (match := _VIDEO.match(each.key))]
            keys_of_nobody = self._aging.unclaimed(videos)
            if keys_of_nobody and self._aging.is_empty():
                # More likely a Redis that lost its data, or a wrong address, than 30 idle days.
                logger.warning("Redis knows of no job at all, so no video is taken for an orphan")
                return
            yield [
                _Due("orphans", key, partial(self._artifacts.delete, key)) for key in keys_of_nobody
            ]

    def _tidy(self, now: datetime) -> None:
        owners = {OPEN_OWNER, *(key.name for key in KeyStore(self._redis).all())}
        self._aging.forget_names(owners, now - timedelta(seconds=redis_keys.RECORD_TTL_S))
        self._aging.tidy_registries()


def told(swept: Swept) -> str:
    """Say how much was deleted."""
    words = {
        "videos": "videos",
        "jobs": "jobs with their videos",
        "orphans": "files that no job names",
        "leftovers": "unfinished files",
    }
    return ", ".join(f"{word}: {swept[kind]}" for kind, word in words.items())


def sweep_deletions(redis: Redis, artifacts: ArtifactStore, ending: threading.Event) -> None:
    """Delete the jobs whose deletion was asked for while they ran, and which have ended since."""
    store = JobStore(redis)
    ended = [
        cast("bytes", each).decode() for each in redis.zrange(redis_keys.DELETIONS, 0, PAGE - 1)
    ]
    sweep = _Sweep(ending)
    sweep.delete(
        [_Due("jobs", each, partial(delete_job, store, artifacts, each)) for each in ended]
    )
    sweep.end()


def _pages(stored: Iterator[Stored]) -> Iterator[list[Stored]]:
    while page := list(islice(stored, PAGE)):
        yield page
