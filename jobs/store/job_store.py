"""The jobs in Redis: records, their order in time, and their way into RQ's queues.

Every change is one script (`jobs/store/lua/`), which may be repeated after a lost answer. After a
claim only the holder of the latest token may write, as long as it renews its lease, and a record in
a terminal state never changes. Redis errors pass through as they are.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from pydantic import BaseModel
from redis import Redis

from jobs import ids, record, redis_keys
from jobs.durations import DurationCache, timeout_s
from jobs.errors import (
    IdempotencyConflict,
    InvalidSpec,
    JobAlreadyFinished,
    JobHeld,
    JobNotCancellable,
    JobNotFound,
    RecordUnreadable,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, JobRecord, Progress, StageTimings, Video
from jobs.spec import GenerationRequest, shown
from jobs.state import JobState
from jobs.store import rq_entry, scripts
from jobs.store.recovery import when_lost
from jobs.store.submission import Idempotency, Submission

logger = logging.getLogger(__name__)

LEASE_S: Final = 15.0
"""A running attempt that was not renewed for this long counts as vanished."""

MAX_PAGE = 200
LIMIT_BOUND = f"a whole number from 1 to {MAX_PAGE}"


@dataclass(frozen=True, slots=True)
class Created:
    """The job of a request.

    Attributes:
        replayed: an earlier request with the same key made it.
        position: how many jobs wait before it; None where that would have to be looked up.
    """

    job: JobRecord
    replayed: bool
    position: int | None = None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Records in their order of creation, or against it. `next_cursor` is None on the last page."""

    jobs: tuple[JobRecord, ...]
    next_cursor: str | None


class JobStore:
    """All access to jobs. Safe to share between threads; one per process is enough."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._create = scripts.load(redis, "create")
        self._claim = scripts.load(redis, "claim")
        self._renew = scripts.load(redis, "renew")
        self._write = scripts.load(redis, "write")
        self._cancel = scripts.load(redis, "cancel")
        self._put_back = scripts.load(redis, "put_back")
        self._purge = scripts.load(redis, "purge")
        self._paces = DurationCache(redis)

    def create(
        self, request: GenerationRequest, queue: str, submission: Submission | None = None
    ) -> Created:
        """Write a queued record with its index entries and put it into its queue, in one step.

        Raises:
            IdempotencyConflict: the key was used for another body within the last day.
            QueueFull, QuotaExceeded: a limit of the submission is reached; nothing was written.
        """
        terms = submission or Submission()
        try:
            return self._create_or_find(request, queue, terms)
        except JobNotFound:
            # The job that the key stood for was deleted between the script and the look at it.
            return self._create_or_find(request, queue, terms)

    def _create_or_find(self, request: GenerationRequest, queue: str, terms: Submission) -> Created:
        job_id, created_at = ids.new_id()
        job = JobRecord(
            id=job_id,
            state=JobState.QUEUED,
            request=request,
            queue=queue,
            owner=terms.owner,
            priority=terms.priority,
            webhook_url=terms.webhook_url,
            deadline_s=timeout_s(request, self._paces.of(request)),
            created_at=created_at,
        )
        fields = [text for field in record.encode_new(job).items() for text in field]
        key = terms.idempotency
        answer, detail, position = self._create(
            *_common(job_id),
            terms.owner,
            int(terms.priority),
            queue,
            "" if terms.queue_limit is None else terms.queue_limit,
            "" if terms.owner_limit is None else terms.owner_limit,
            "" if key is None else redis_keys.idempotency(terms.owner, key.key),
            "" if key is None else key.body_sha256,
            ids.id_at(created_at.timestamp() - redis_keys.RECORD_TTL_S),
            len(fields),
            *fields,
            *rq_entry.rq_fields(job_id, queue, job.deadline_s),
        )
        match answer:
            case b"created":
                return Created(job, replayed=False, position=position if position >= 0 else None)
            case b"replayed":
                return Created(self.get(detail.decode()), replayed=True)
            case b"conflict":
                raise _conflict(detail.decode())
            case _:
                raise terms.refusal(answer.decode(), detail)

    def replay(self, owner: str, idempotency: Idempotency) -> JobRecord | None:
        """Find the job that an earlier request with this key made; None if there is none.

        Raises:
            IdempotencyConflict: that request had another body.
        """
        key = redis_keys.idempotency(owner, idempotency.key)
        found, body = self._redis.hmget(key, ["job", "body"])
        if found is None:
            return None
        job_id = cast("bytes", found).decode()
        fields = self._fields(job_id)
        if not fields:
            return None
        if body != idempotency.body_sha256.encode():
            raise _conflict(job_id)
        return record.decode(job_id, fields)

    def get(self, job_id: str) -> JobRecord:
        """Read one record.

        Raises:
            JobNotFound: no such id, its 30 days are over, or it was deleted.
            RecordUnreadable: see `jobs.record.decode`.
        """
        fields = self._fields(ids.checked(job_id))
        if not fields:
            raise ids.not_found(job_id)
        return record.decode(job_id, fields)

    def list(
        self,
        state: JobState | None = None,
        owner: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        *,
        oldest_first: bool = False,
    ) -> JobPage:
        """Read up to `limit` records, newest first, after the page whose `next_cursor` it was.

        owner: whose jobs; everybody's if None. A record that cannot be read is logged and left
        out: it must not hide the others. So a page may be short, or empty, and not be the last.

        Raises:
            InvalidSpec: a limit out of bounds, or a cursor that is none.
        """
        if not 1 <= limit <= MAX_PAGE:
            given = shown(limit)
            raise InvalidSpec.of(
                "limit", given, LIMIT_BOUND, f"limit is {given}, which is not {LIMIT_BOUND}."
            )
        last_seen = None if cursor is None else "(" + ids.read_cursor(cursor)
        index = redis_keys.index("all" if state is None else state.value, owner)
        if oldest_first:
            found = self._redis.zrangebylex(index, last_seen or "-", "+", start=0, num=limit + 1)
        else:
            found = self._redis.zrevrangebylex(index, last_seen or "+", "-", start=0, num=limit + 1)
        names = [cast("bytes", each).decode() for each in found]
        page = names[:limit]
        more = len(names) > limit
        return JobPage(self._read_all(page), ids.cursor_after(page[-1]) if more else None)

    def claim(self, job_id: str, worker: str, token: str | None = None) -> Attempt:
        """Start an attempt for the next LEASE_S seconds.

        token: `new_token()`, for one who may have to repeat the call: it is the same attempt then.

        Raises:
            JobAlreadyFinished: there is nothing to do: the job has ended. End the task quietly.
            JobHeld: another attempt has the job; if that one has vanished, the job will be put
                back into its queue (`jobs/store/recovery.py`). End the task quietly.
            JobNotFound: the record has expired or was deleted.
        """
        token = token or new_token()
        state, number = self._claim(
            *_common(ids.checked(job_id)), token, worker, int(LEASE_S * 1000)
        )
        match state:
            case b"running":
                return Attempt(job_id=job_id, number=int(number), token=token)
            case b"missing":
                raise ids.not_found(job_id)
            case b"held":
                raise JobHeld(f"Attempt {number} has job {job_id}.", job_id=job_id)
            case _:
                raise JobAlreadyFinished(
                    f"Job {job_id} is {state.decode()}; there is nothing to run.",
                    job_id=job_id,
                    state=state.decode(),
                )

    def renew(self, attempt: Attempt) -> bool:
        """Lengthen the lease to LEASE_S from now; says whether the job is to be cancelled.

        Raises:
            StaleAttempt: the job has ended or a newer attempt owns it: stop.
        """
        answer = self._renew(*_common(attempt.job_id), attempt.token, int(LEASE_S * 1000))
        if answer not in (b"ok", b"cancel"):
            raise _stale(attempt, f"the record says {answer.decode()}")
        return bool(answer == b"cancel")

    def release(self, attempt: Attempt) -> JobState:
        """Give the job back to the front of its queue; the attempt does not count as lost.

        A job that was to be cancelled is cancelled instead. Raises StaleAttempt.
        """
        return self._end_attempt(attempt, lost=False)

    def give_up(self, attempt: Attempt) -> JobState:
        """End an attempt that will not come back: the job is queued again, or failed for good.

        Raises StaleAttempt.
        """
        return self._end_attempt(attempt, lost=True)

    def progress(self, attempt: Attempt, progress: Progress) -> None:
        """Publish how far the attempt is. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.RUNNING, progress=progress)

    def succeed(self, attempt: Attempt, video: Video, timings: StageTimings) -> None:
        """End the job with its video. Raises StaleAttempt: then the video is not the job's."""
        self._write_attempt(attempt, JobState.SUCCEEDED, video=video, timings=timings)

    def fail(self, attempt: Attempt, failure: Failure) -> None:
        """End the job with a failure. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.FAILED, failure.code, failure=failure)

    def cancelled(self, attempt: Attempt) -> None:
        """End the job as cancelled, once the device has stopped. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.CANCELLED)

    def cancel_requested(self, attempt: Attempt) -> bool:
        """Say whether the attempt should stop; cheaper than `renew`, and leaves the lease alone.

        Raises:
            StaleAttempt: the job has ended or a newer attempt owns it: stop, too.
        """
        token, state, wanted = self._redis.hmget(
            redis_keys.record(attempt.job_id), ["token", "state", "cancel_requested"]
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
        answer = self._cancel(*_common(job_id))
        if answer == b"missing":
            raise ids.not_found(job_id)
        if answer in (JobState.SUCCEEDED.encode(), JobState.FAILED.encode()):
            raise JobNotCancellable(
                f"Job {job_id} has already {answer.decode()}; only queued and running jobs can be "
                f"cancelled.",
                job_id=job_id,
                state=answer.decode(),
            )
        return self.get(job_id)

    def purge(self, job_id: str) -> bool:
        """Delete a job and all that is known of it, but its video; says whether it is gone now.

        A running job is cancelled and deleted when it has ended (its id is then in
        `keys.DELETIONS`); nobody can read it from now on. Deleting what is not there is no error.
        """
        return bool(self._purge(*_common(ids.checked(job_id))) != b"marked")

    def _fields(self, job_id: str) -> dict[bytes, bytes]:
        """The hash of a record; empty if there is none, or it is to be deleted."""
        fields = cast("dict[bytes, bytes]", self._redis.hgetall(redis_keys.record(job_id)))
        return {} if b"delete_requested" in fields else fields

    def _read_all(self, names: Sequence[str]) -> tuple[JobRecord, ...]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in names:
                pipe.hgetall(redis_keys.record(job_id))
            found: Sequence[dict[bytes, bytes]] = pipe.execute()
        jobs = []
        for job_id, fields in zip(names, found, strict=True):
            # A record may expire a moment before its index entry is swept.
            if not fields or b"delete_requested" in fields:
                continue
            try:
                jobs.append(record.decode(job_id, fields))
            except RecordUnreadable as error:
                logger.error("Left out of a list: %s", error)
        return tuple(jobs)

    def _end_attempt(self, attempt: Attempt, *, lost: bool) -> JobState:
        rq_fields = rq_entry.rq_fields_again(self._redis, attempt.job_id)
        if rq_fields is None:
            raise _stale(attempt, "it is gone")
        answer = self._put_back(
            *_common(attempt.job_id),
            attempt.token,
            int(lost),
            *when_lost(),
            *rq_fields,
        )
        if answer in (b"missing", b"superseded"):
            raise _stale(attempt, f"the record says {answer.decode()}")
        return JobState(answer.decode())

    def get_for(self, attempt: Attempt) -> JobRecord:
        """Read the record an attempt works on, also while its deletion waits for the attempt.

        Raises:
            StaleAttempt: there is none any more.
            RecordUnreadable: see `jobs.record.decode`.
        """
        fields = cast("dict[bytes, bytes]", self._redis.hgetall(redis_keys.record(attempt.job_id)))
        if not fields:
            raise _stale(attempt, "it is gone")
        return record.decode(attempt.job_id, fields)

    def _write_attempt(
        self, attempt: Attempt, target: JobState, code: str = "", **parts: BaseModel
    ) -> None:
        fields = [text for name, part in parts.items() for text in (name, part.model_dump_json())]
        answer = self._write(*_common(attempt.job_id), attempt.token, target.value, code, *fields)
        if answer != b"ok":
            raise _stale(attempt, f"the record says {answer.decode()}")


def new_token() -> str:
    """What proves an attempt's right to its job."""
    return secrets.token_hex(16)


def _common(job_id: str) -> tuple[str, str]:
    """The arguments most scripts start with."""
    return job_id, record.now().isoformat()


def _conflict(job_id: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"This Idempotency-Key was used for another request, which made job {job_id}; use a new "
        f"key for a new request.",
        job_id=job_id,
    )


def _stale(attempt: Attempt, why: str) -> StaleAttempt:
    return StaleAttempt(
        f"Attempt {attempt.number} no longer owns job {attempt.job_id}: {why}.",
        job_id=attempt.job_id,
        attempt=attempt.number,
    )
