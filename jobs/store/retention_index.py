"""Find jobs by their age, oldest first and in pages, with the facts that retention needs.

Ids sort by the time of creation, so the indexes are in order of age; but an old job may have ended
just now. Only the necessary fields are read. A record that cannot be read is left alone.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, cast

from redis import Redis
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from jobs import ids, redis_keys
from jobs.state import JobState
from jobs.store import scripts

logger = logging.getLogger(__name__)

PAGE: Final = 200
"""The most jobs of one page."""

_FIELDS: Final = (
    "state",
    "created_at",
    "finished_at",
    "video",
    "video_deleted_at",
    "created_ms",
    "format",
)


@dataclass(frozen=True, slots=True)
class RetentionEntry:
    """The facts of a job that retention needs.

    `file_keys` are those of its video and the pictures of it; empty without a video to delete.
    """

    id: str
    state: JobState
    created_at: datetime
    finished_at: datetime | None
    file_keys: tuple[str, ...]


class RetentionIndex:
    """Finds old jobs, and records what was deleted. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._video_deleted = scripts.load(redis, "video_deleted")

    def created_before(self, state: JobState, moment: datetime) -> Iterator[list[RetentionEntry]]:
        """Iterate over pages of jobs in `state`, oldest first; they may be deleted meanwhile."""
        last, end = "-", "(" + ids.id_prefix(moment.timestamp())
        while True:
            found = self._redis.zrangebylex(redis_keys.index(state), last, end, start=0, num=PAGE)
            page = [cast("bytes", each).decode() for each in found]
            if not page:
                return
            last = "(" + page[-1]
            yield list(self._read(page).values())

    def video_deleted(self, job_id: str) -> None:
        """Record that the job's video was deleted; does nothing if the job no longer exists."""
        self._video_deleted(job_id)

    def unreferenced(self, files: Sequence[tuple[str, str]]) -> list[str]:
        """Return the keys that are no job's video or picture and never will be.

        A job that has not ended may still come to refer to the files of any of its attempts. A
        record that cannot be read counts as referring to all of its own files.

        Args:
            files: pairs of a job id and an artifact key.
        """
        known = self._fields([job_id for job_id, _ in files])
        return [
            key
            for (job_id, key), fields in zip(files, known, strict=True)
            if not _may_refer(job_id, fields, key)
        ]

    def is_empty(self) -> bool:
        """Return whether Redis has no job at all."""
        return not self._redis.exists(redis_keys.index("all"))

    def remove_entries(self, owners: Iterable[str], moment: datetime) -> None:
        """Remove jobs created before `moment` from the indexes, whether or not they expired."""
        end = "(" + ids.id_prefix(moment.timestamp())
        with self._redis.pipeline(transaction=False) as pipe:
            for owner in (None, *owners):
                for state in ("all", *JobState):
                    pipe.zremrangebylex(redis_keys.index(state, owner), "-", end)
            pipe.execute()

    def clean_registries(self) -> None:
        """Clean RQ's registries, as queues without a worker are not cleaned by RQ itself."""
        for queue in Queue.all(connection=self._redis):
            for registry in (FinishedJobRegistry, FailedJobRegistry):
                registry(queue.name, connection=self._redis).cleanup()

    def _read(self, job_ids: Sequence[str]) -> dict[str, RetentionEntry]:
        found, unreadable = {}, []
        for job_id, fields in zip(job_ids, self._fields(job_ids), strict=True):
            if fields[0] is None:  # expired; `remove_entries` removes its id
                continue
            try:
                found[job_id] = _decode(job_id, fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                unreadable.append((job_id, type(error).__name__))
        if unreadable:
            logger.error(
                "The age of %d jobs cannot be read, %s (%s) the first of them; they stay until "
                "their records lapse.",
                len(unreadable),
                *unreadable[0],
            )
        return found

    def _fields(self, job_ids: Sequence[str]) -> list[list[bytes | None]]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(redis_keys.record(job_id), *_FIELDS)
            return cast("list[list[bytes | None]]", pipe.execute())


def _decode(job_id: str, fields: Sequence[bytes | None]) -> RetentionEntry:
    state, created, finished, video, deleted, created_ms, written = (
        None if field is None else field.decode() for field in fields
    )
    if written not in (None, str(redis_keys.FORMAT)):
        raise ValueError("another format")
    assert state is not None, "a record that is there has a state"
    created_at = datetime.fromisoformat(created or "")
    if created_ms is not None:  # by Redis' clock, where `created_at` is by the service's
        created_at = datetime.fromtimestamp(int(created_ms) / 1000, UTC)
    return RetentionEntry(
        id=job_id,
        state=JobState(state),
        created_at=created_at,
        finished_at=None if finished is None else datetime.fromisoformat(finished),
        file_keys=() if video is None or deleted is not None else _file_keys(json.loads(video)),
    )


def _file_keys(video: dict[str, Any]) -> tuple[str, ...]:
    # Pictures of kinds that another version added are deleted with the video, too.
    pictures = (part for part in video.values() if isinstance(part, dict) and "key" in part)
    return (video["key"], *(picture["key"] for picture in pictures))


def _may_refer(job_id: str, fields: Sequence[bytes | None], key: str) -> bool:
    """Return whether a job refers to an artifact, or may come to do so."""
    if fields[0] is None:
        return False
    try:
        job = _decode(job_id, fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return True
    return not job.state.is_terminal or key in job.file_keys
