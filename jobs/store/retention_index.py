"""Jobs by their age: found oldest first, some hundred at a time, with what decides their end.

Ids sort by the time of creation, so the indexes are in order of age, and an old job may still have
ended a moment ago. Only what is needed is read, and a record that cannot be read is left alone.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, cast

from redis import Redis
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from jobs import ids, record, redis_keys
from jobs.state import JobState
from jobs.store import scripts

logger = logging.getLogger(__name__)

PAGE: Final = 200

_FIELDS: Final = ("state", "created_at", "finished_at", "video", "video_deleted_at")


@dataclass(frozen=True, slots=True)
class AgedJob:
    """What is known of a job when its end is considered; `video_key` is None once it is deleted."""

    id: str
    state: JobState
    created_at: datetime
    finished_at: datetime | None
    video_key: str | None


class Aging:
    """Finds old jobs and notes what has become of them. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._video_deleted = scripts.load(redis, "video_deleted")

    def created_before(self, state: JobState, moment: datetime) -> Iterator[list[AgedJob]]:
        """Page through the jobs in `state`, oldest first; they may be deleted meanwhile."""
        last, end = "-", "(" + ids.id_at(moment.timestamp())
        while True:
            found = self._redis.zrangebylex(redis_keys.index(state), last, end, start=0, num=PAGE)
            page = [cast("bytes", each).decode() for each in found]
            if not page:
                return
            last = "(" + page[-1]
            yield list(self._read(page).values())

    def video_deleted(self, job_id: str) -> None:
        """Note that the job's video is gone; nothing happens if the job is gone, too."""
        self._video_deleted(job_id, record.now().isoformat())

    def unclaimed(self, videos: Sequence[tuple[str, str]]) -> list[str]:
        """Say which of these (job id, artifact key) pairs are no job's video, and never will be.

        A job that has not ended may still come to name any of its attempts' videos. A record that
        cannot be read claims all of its own.
        """
        known = self._fields([job_id for job_id, _ in videos])
        return [
            key
            for (job_id, key), fields in zip(videos, known, strict=True)
            if not _claims(job_id, fields, key)
        ]

    def is_empty(self) -> bool:
        """Whether Redis knows of no job at all."""
        return not self._redis.exists(redis_keys.index("all"))

    def forget_names(self, owners: Iterable[str], moment: datetime) -> None:
        """Take jobs created before `moment` out of the indexes, be their records lapsed or not."""
        end = "(" + ids.id_at(moment.timestamp())
        with self._redis.pipeline(transaction=False) as pipe:
            for owner in (None, *owners):
                for state in ("all", *JobState):
                    pipe.zremrangebylex(redis_keys.index(state, owner), "-", end)
            pipe.execute()

    def tidy_registries(self) -> None:
        """Do RQ's own cleaning for queues that have no worker left to do it."""
        for queue in Queue.all(connection=self._redis):
            for registry in (FinishedJobRegistry, FailedJobRegistry):
                registry(queue.name, connection=self._redis).cleanup()

    def _read(self, job_ids: Sequence[str]) -> dict[str, AgedJob]:
        found = {}
        for job_id, fields in zip(job_ids, self._fields(job_ids), strict=True):
            if fields[0] is None:  # lapsed; its name goes with `forget_names`
                continue
            try:
                found[job_id] = _decode(job_id, fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.error(
                    "The age of job %s cannot be read (%s); it stays until its record lapses.",
                    job_id,
                    type(error).__name__,
                )
        return found

    def _fields(self, job_ids: Sequence[str]) -> list[list[bytes | None]]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(redis_keys.record(job_id), *_FIELDS)
            return cast("list[list[bytes | None]]", pipe.execute())


def _decode(job_id: str, fields: Sequence[bytes | None]) -> AgedJob:
    state, created, finished, video, deleted = (
        None if field is None else field.decode() for field in fields
    )
    assert state is not None, "a record that is there has a state"
    return AgedJob(
        id=job_id,
        state=JobState(state),
        created_at=datetime.fromisoformat(created or ""),
        finished_at=None if finished is None else datetime.fromisoformat(finished),
        video_key=None if video is None or deleted is not None else json.loads(video)["key"],
    )


def _claims(job_id: str, fields: Sequence[bytes | None], key: str) -> bool:
    if fields[0] is None:
        return False
    try:
        job = _decode(job_id, fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return True
    return not job.state.is_terminal or job.video_key == key
