"""The jobs in Redis: records, their order in time, and their way into RQ's queues.

Creation is one MULTI; every later change is one script (`jobs/scripts.py`). After a claim only the
holder of the latest token may write, and a record in a terminal state never changes. Redis errors
pass through as they are.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from pydantic import BaseModel
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq import Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs import keys, record, scripts
from jobs.deadline import timeout_s
from jobs.errors import (
    InvalidSpec,
    JobAlreadyFinished,
    JobNotCancellable,
    JobNotFound,
    RecordUnreadable,
    StaleAttempt,
    StoreUnavailable,
)
from jobs.record import Attempt, Failure, JobRecord, Progress, StageTimings, Video
from jobs.spec import GenerationRequest, shown
from jobs.state import JobState

logger = logging.getLogger(__name__)

TASK = "worker.tasks.generate"
MAX_ATTEMPTS = 2
"""A job begun this often without an end is failed at the next claim, not run for ever."""
RQ_RETRIES = 5
"""More than MAX_ATTEMPTS, so that a claim, which can write the record, always has the last word."""
MAX_PAGE = 200
LIMIT_BOUND = f"a whole number from 1 to {MAX_PAGE}"
WORKER_LOST = Failure(
    code="worker_lost",
    detail=f"The job was begun {MAX_ATTEMPTS} times without reaching an end, so it was given up. "
    "Send it again; the worker's log has the reason.",
)

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class JobPage:
    """Records, newest first. `next_cursor` is None on the last page."""

    jobs: tuple[JobRecord, ...]
    next_cursor: str | None


class JobStore:
    """All access to jobs. Safe to share between threads; one per process is enough."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._claim = cast("Callable[..., Any]", redis.register_script(scripts.CLAIM))
        self._write = cast("Callable[..., Any]", redis.register_script(scripts.WRITE))
        self._cancel = cast("Callable[..., Any]", redis.register_script(scripts.CANCEL))

    def create(self, request: GenerationRequest, queue: str) -> JobRecord:
        """Write a queued record, its index entries and its RQ job in one transaction.

        Raises:
            StoreUnavailable: the connection broke during the transaction. It is not repeated,
                because a second enqueue might run the job twice; whether the job exists is then
                unknown.
        """
        job_id, created_at = _new_id()
        job = JobRecord(
            id=job_id, state=JobState.QUEUED, request=request, queue=queue, created_at=created_at
        )
        with self._redis.pipeline(transaction=True) as pipe:
            # A watching pipeline is never repeated by the client's retry policy.
            pipe.watch(keys.record(job_id))  # type: ignore[no-untyped-call]
            pipe.multi()
            self._add_record(pipe, job)
            self._enqueue(pipe, job)
            try:
                pipe.execute()
            except WatchError as error:
                raise StoreUnavailable(
                    "The connection to Redis broke while the job was being queued; it may or may "
                    "not be queued.",
                    job_id=job_id,
                ) from error
        return job

    def get(self, job_id: str) -> JobRecord:
        """Read one record.

        Raises:
            JobNotFound: no such id, or its 30 days are over.
            RecordUnreadable: see `jobs.record.decode`.
        """
        fields = self._redis.hgetall(keys.record(_checked(job_id)))
        if not fields:
            raise _not_found(job_id)
        return record.decode(job_id, cast("dict[bytes, bytes]", fields))

    def list(
        self, state: JobState | None = None, limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """Read up to `limit` records, newest first, after the page whose `next_cursor` it was.

        A record that cannot be read is logged and left out: it must not hide the others.

        Raises:
            InvalidSpec: a limit out of bounds, or a cursor that is none.
        """
        if not 1 <= limit <= MAX_PAGE:
            given = shown(limit)
            raise InvalidSpec.of(
                "limit", given, LIMIT_BOUND, f"limit is {given}, which is not {LIMIT_BOUND}."
            )
        start = "+" if cursor is None else "(" + _read_cursor(cursor)
        index = keys.INDEX_ALL if state is None else keys.index(state)
        found = self._redis.zrevrangebylex(index, start, "-", start=0, num=limit + 1)
        ids = [cast("bytes", each).decode() for each in found]
        page = ids[:limit]
        more = len(ids) > limit
        return JobPage(self._read_all(page), f"c{page[-1]}" if more else None)

    def claim(self, job_id: str) -> Attempt:
        """Start an attempt; any earlier attempt of the job becomes stale.

        Raises:
            JobAlreadyFinished: there is nothing to do: the job has ended, was cancelled, or has
                just been failed because its attempts are used up. End the task quietly.
            JobNotFound: the record has expired.
        """
        token = secrets.token_hex(16)
        state, number = self._claim(
            keys=[keys.record(_checked(job_id))],
            args=[*_common(job_id), token, MAX_ATTEMPTS, WORKER_LOST.model_dump_json()],
        )
        if state == b"missing":
            raise _not_found(job_id)
        if state != b"running":
            raise JobAlreadyFinished(
                f"Job {job_id} is {state.decode()}; there is nothing to run.",
                job_id=job_id,
                state=state.decode(),
            )
        return Attempt(job_id=job_id, number=int(number), token=token)

    def progress(self, attempt: Attempt, progress: Progress) -> None:
        """Publish how far the attempt is. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.RUNNING, progress=progress)

    def succeed(self, attempt: Attempt, video: Video, timings: StageTimings) -> None:
        """End the job with its video. Raises StaleAttempt: then the video is not the job's."""
        self._write_attempt(attempt, JobState.SUCCEEDED, video=video, timings=timings)

    def fail(self, attempt: Attempt, failure: Failure) -> None:
        """End the job with a failure. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.FAILED, failure=failure)

    def cancelled(self, attempt: Attempt) -> None:
        """End the job as cancelled, once the device has stopped. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.CANCELLED)

    def cancel_requested(self, attempt: Attempt) -> bool:
        """Say whether the attempt should stop.

        Raises:
            StaleAttempt: the job has ended or a newer attempt owns it: stop, too.
        """
        token, state, wanted = self._redis.hmget(
            keys.record(attempt.job_id), ["token", "state", "cancel_requested"]
        )
        if token != attempt.token.encode() or state != JobState.RUNNING.encode():
            raise _stale(attempt, "it has ended, has expired, or a newer attempt owns it")
        return wanted == b"1"

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job: at once while it is queued, by asking its worker while it runs.

        Cancelling a cancelled job changes nothing.

        Raises:
            JobNotFound, JobNotCancellable: the latter when it has succeeded or failed.
            RecordUnreadable: see `jobs.record.decode`; nothing was changed.
        """
        # First, because an error must not stand for something that was done.
        self.get(job_id)
        answer = self._cancel(
            keys=[keys.record(_checked(job_id)), Job.key_for(job_id)],
            args=[*_common(job_id), Queue.redis_queue_namespace_prefix],
        )
        if answer == b"missing":
            raise _not_found(job_id)
        if answer in (JobState.SUCCEEDED.encode(), JobState.FAILED.encode()):
            raise JobNotCancellable(
                f"Job {job_id} has already {answer.decode()}; only queued and running jobs can be "
                f"cancelled.",
                job_id=job_id,
                state=answer.decode(),
            )
        return self.get(job_id)

    def _add_record(self, pipe: Pipeline, job: JobRecord) -> None:
        key = keys.record(job.id)
        pipe.hset(key, mapping=cast("dict[Any, Any]", record.encode_new(job)))
        pipe.expire(key, keys.RECORD_TTL_S)
        oldest = _id_at(job.created_at.timestamp() - keys.RECORD_TTL_S)
        for index in (keys.INDEX_ALL, *(keys.index(state) for state in JobState)):
            pipe.zremrangebylex(index, "-", "(" + oldest)
        pipe.zadd(keys.INDEX_ALL, {job.id: 0})
        pipe.zadd(keys.index(job.state), {job.id: 0})

    def _enqueue(self, pipe: Pipeline, job: JobRecord) -> None:
        queue = Queue(job.queue, connection=self._redis, serializer=JSONSerializer)
        rq_job = queue.create_job(
            TASK,
            args=(job.id,),
            job_id=job.id,
            timeout=timeout_s(job.request),
            result_ttl=keys.RQ_RESULT_TTL_S,
            failure_ttl=keys.RQ_FAILURE_TTL_S,
            retry=Retry(max=RQ_RETRIES),
        )
        queue.enqueue_job(rq_job, pipeline=pipe)

    def _read_all(self, ids: Sequence[str]) -> tuple[JobRecord, ...]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.record(job_id))
            found: Sequence[dict[bytes, bytes]] = pipe.execute()
        jobs = []
        for job_id, fields in zip(ids, found, strict=True):
            # A record may expire a moment before its index entry is swept.
            if not fields:
                continue
            try:
                jobs.append(record.decode(job_id, fields))
            except RecordUnreadable as error:
                logger.error("Left out of a list: %s", error)
        return tuple(jobs)

    def _write_attempt(self, attempt: Attempt, target: JobState, **parts: BaseModel) -> None:
        fields = [text for name, part in parts.items() for text in (name, part.model_dump_json())]
        answer = self._write(
            keys=[keys.record(attempt.job_id)],
            args=[*_common(attempt.job_id), attempt.token, target.value, *fields],
        )
        if answer != b"ok":
            raise _stale(attempt, f"the record says {answer.decode()}")


def _common(job_id: str) -> tuple[str, str, str]:
    """The arguments every script starts with."""
    return job_id, keys.INDEX_PREFIX, record.now().isoformat()


def _new_id() -> tuple[str, datetime]:
    """Make an id which sorts by its time: 12 hex digits of milliseconds, then 80 random bits."""
    second = time.time()
    millisecond = int(second * 1000)
    created_at = datetime.fromtimestamp(millisecond / 1000, UTC)
    return _id_at(second) + secrets.token_hex(10), created_at


def _id_at(second: float) -> str:
    return f"{int(second * 1000):012x}"


def _checked(job_id: str) -> str:
    """Refuse what cannot be an id before it becomes part of a key."""
    if not _JOB_ID.fullmatch(job_id):
        raise _not_found(job_id)
    return job_id


def _read_cursor(cursor: str) -> str:
    if not (cursor.startswith("c") and _JOB_ID.fullmatch(cursor[1:])):
        raise InvalidSpec.of(
            "cursor",
            shown(cursor),
            "the next_cursor of an earlier page",
            "cursor is not one this service has given; take next_cursor of the page before, or "
            "leave it out.",
        )
    return cursor[1:]


def _not_found(job_id: str) -> JobNotFound:
    name = shown(job_id)
    return JobNotFound(
        f"There is no job {name}. Records are kept for 30 days after a job's creation.", job_id=name
    )


def _stale(attempt: Attempt, why: str) -> StaleAttempt:
    return StaleAttempt(
        f"Attempt {attempt.number} no longer owns job {attempt.job_id}: {why}.",
        job_id=attempt.job_id,
        attempt=attempt.number,
    )
