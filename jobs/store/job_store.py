"""Store jobs in Redis: their records, the indexes by time, and the entries in RQ's queues.

Every change is one Lua script (`jobs/store/lua/`), which may be repeated after a lost response.
After a claim, only the holder of the latest token may write, as long as it renews its lease. A
final state never changes; afterwards only the deletion of the video is recorded. Redis errors are
not caught.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from pydantic import BaseModel
from redis import Redis

from jobs import ids, record, redis_keys
from jobs.durations import DurationCache, timeout_s
from jobs.errors import (
    JobAlreadyFinished,
    JobHeld,
    JobNotCancellable,
    JobNotFound,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, JobRecord, Progress, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store import recovery, rq_entry, scripts
from jobs.store.durability import Durability
from jobs.store.listing import JobPage, Listing, Wanted
from jobs.store.submission import Idempotency, Submission, conflict
from jobs.telemetry import job_spans, tracing

LEASE_S: Final = redis_keys.LEASE_S


@dataclass(frozen=True, slots=True)
class Created:
    """The result of creating a job.

    Attributes:
        replayed: whether an earlier request with the same Idempotency-Key created the job.
        position: how many jobs wait before it; None if that would need another look-up.
        others: the further jobs of the same request.
    """

    job: JobRecord
    replayed: bool
    position: int | None = None
    others: tuple[JobRecord, ...] = ()


class JobStore:
    """All access to jobs. Safe to share between threads; one per process is enough."""

    def __init__(self, redis: Redis, durability: Durability | None = None) -> None:
        self._redis = redis
        self._durability = durability or Durability()
        self._create = scripts.load(redis, "create")
        self._claim = scripts.load(redis, "claim")
        self._renew = scripts.load(redis, "renew")
        self._write = scripts.load(redis, "write")
        self._cancel = scripts.load(redis, "cancel")
        self._put_back = scripts.load(redis, "put_back")
        self._purge = scripts.load(redis, "purge")
        self._durations = DurationCache(redis)
        self._listing = Listing(redis)

    def create(
        self, request: GenerationRequest, queue: str, submission: Submission | None = None
    ) -> Created:
        """Create a queued job: record, index entries and queue entry, in one atomic step."""
        return self.create_all([request], queue, submission)

    def create_all(
        self,
        requests: Sequence[GenerationRequest],
        queue: str,
        submission: Submission | None = None,
    ) -> Created:
        """Create a queued job for each request, all of them or none, in one atomic step.

        Raises:
            IdempotencyConflict: the Idempotency-Key was used for another body in the last day.
            QueueFull, QuotaExceeded: a limit of the submission is reached; nothing was written.
            StoreUnavailable: the job was created, and what `durability` asks for is not certain.
        """
        submission = submission or Submission()
        try:
            return self._create_or_find(requests, queue, submission)
        except JobNotFound:
            # The key's earlier job was deleted after the script found it, and before it was read.
            return self._create_or_find(requests, queue, submission)

    def _create_or_find(
        self, requests: Sequence[GenerationRequest], queue: str, submission: Submission
    ) -> Created:
        with job_spans.sending(queue, len(requests)) as span:
            jobs = self._new_jobs(requests, queue, submission)
            key = submission.idempotency
            answer, detail, position = self._create(
                len(jobs),
                record.now().isoformat(),
                submission.owner,
                int(submission.priority),
                queue,
                "" if submission.queue_limit is None else submission.queue_limit,
                "" if submission.owner_limit is None else submission.owner_limit,
                "" if key is None else redis_keys.idempotency(submission.owner, key.key),
                "" if key is None else key.body_sha256,
                ids.id_prefix(jobs[0].created_at.timestamp() - redis_keys.RECORD_TTL_S),
                *(text for job in jobs for text in rq_entry.both_hashes(job)),
            )
            made = {"messaging.message.id": jobs[0].id} if answer == b"created" else {}
            span.set({"wan.outcome": answer.decode(), **made})
        match answer:
            case b"created":
                self._durability.confirm(self._redis, jobs[0].id)
                waiting = position if position >= 0 else None
                return Created(jobs[0], replayed=False, position=waiting, others=jobs[1:])
            case b"replayed":
                names = detail.decode().split()
                self._durability.confirm(self._redis, names[0])
                return Created(self.get(names[0]), True, others=self._still_there(names[1:]))
            case b"conflict":
                raise conflict(detail.decode())
            case _:
                raise submission.refusal(answer.decode(), detail, len(jobs))

    def _new_jobs(
        self, requests: Sequence[GenerationRequest], queue: str, submission: Submission
    ) -> tuple[JobRecord, ...]:
        """Make the records of new jobs, in the order of the requests and of their ids."""
        made = sorted(ids.new_id() for _ in requests)
        trace = tracing.current_fields()
        return tuple(
            JobRecord(
                id=job_id,
                state=JobState.QUEUED,
                request=request,
                queue=queue,
                owner=submission.owner,
                priority=submission.priority,
                webhook_url=submission.webhook_url,
                metadata=dict(submission.metadata),
                group=made[0][0] if submission.is_group else None,
                deadline_s=timeout_s(request, self._durations.of(request)),
                created_at=created_at,
                **trace,
            )
            for request, (job_id, created_at) in zip(requests, made, strict=True)
        )

    def _still_there(self, names: Sequence[str]) -> tuple[JobRecord, ...]:
        found = ((name, self._fields(name)) for name in names)
        return tuple(record.decode(name, fields) for name, fields in found if fields)

    def replay(self, owner: str, idempotency: Idempotency) -> Created | None:
        """Find the jobs that an earlier request with this key created; None if there are none.

        Raises:
            IdempotencyConflict: that request had another body.
            StoreUnavailable: as `create`.
        """
        key = redis_keys.idempotency(owner, idempotency.key)
        found, body = self._redis.hmget(key, ["job", "body"])
        if found is None:
            return None
        job_id, *others = cast("bytes", found).decode().split()
        fields = self._fields(job_id)
        if not fields:
            return None
        if body != idempotency.body_sha256.encode():
            raise conflict(job_id)
        self._durability.confirm(self._redis, job_id)
        return Created(record.decode(job_id, fields), True, others=self._still_there(others))

    def get(self, job_id: str) -> JobRecord:
        """Read one record.

        Raises:
            JobNotFound: the id is unknown, its 30 days are over, or the job was deleted.
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
        wanted: Wanted = Wanted(),  # noqa: B008  # it never changes
    ) -> JobPage:
        """Read up to `limit` records, newest first unless `oldest_first`.

        An unreadable record is logged and left out, so a page may be short without being the last;
        it is empty only after thousands of such records.

        Args:
            owner: whose jobs to list; everybody's if None.
            cursor: the `next_cursor` of the page before.
            wanted: what else the jobs have to be; its state and owner are not read.

        Raises:
            InvalidSpec: the limit is out of bounds, or the cursor malformed.
        """
        wanted = dataclasses.replace(wanted, state=state, owner=owner)
        return self._listing.page(wanted, limit, cursor, oldest_first=oldest_first)

    def claim(self, job_id: str, worker: str, token: str | None = None) -> Attempt:
        """Start an attempt, with a lease of LEASE_S seconds.

        Args:
            token: a `new_token()`, so that a repeated call gets the same attempt.

        Raises:
            JobAlreadyFinished: the job has ended; end the task without an error.
            JobHeld: another attempt owns the job; end the task without an error. If that attempt
                is lost, `jobs/store/recovery.py` puts the job back into its queue.
            JobNotFound: the record has expired or was deleted.
            RecordUnreadable: another version wrote it, in a format that this one does not read;
                leave the job to a worker of that version. Recovery delivers it again.
        """
        token = token or new_token()
        state, number = self._claim(
            *_id_and_now(ids.checked(job_id)), token, worker, int(LEASE_S * 1000)
        )
        match state:
            case b"running":
                return Attempt(job_id=job_id, number=int(number), token=token)
            case b"missing":
                raise ids.not_found(job_id)
            case b"format":
                raise record.other_format(job_id, number.decode())
            case b"held":
                raise JobHeld(f"Attempt {number} has job {job_id}.", job_id=job_id)
            case _:
                raise JobAlreadyFinished(
                    f"Job {job_id} is {state.decode()}; there is nothing to run.",
                    job_id=job_id,
                    state=state.decode(),
                )

    def renew(self, attempt: Attempt) -> bool:
        """Renew the lease for LEASE_S from now; return whether the job is to be cancelled.

        Raises:
            StaleAttempt: the job has ended, or a newer attempt owns it: stop.
        """
        answer = self._renew(*_id_and_now(attempt.job_id), attempt.token, int(LEASE_S * 1000))
        if answer not in (b"ok", b"cancel"):
            raise _stale(attempt, f"the record says {answer.decode()}")
        return bool(answer == b"cancel")

    def release(self, attempt: Attempt) -> JobState:
        """Put the job back to the front of its queue; the attempt does not count as lost.

        A job that is to be cancelled is cancelled instead. Raises StaleAttempt.
        """
        return self._end_attempt(attempt, recovery.NOT_COUNTED)

    def give_up(self, attempt: Attempt) -> JobState:
        """End an attempt as lost: queue the job again or, after too many, fail it.

        Raises StaleAttempt.
        """
        return self._end_attempt(attempt, recovery.lost_attempt_args())

    def hand_back(self, attempt: Attempt, reason: str) -> JobState:
        """End an attempt whose worker is at fault: as `give_up`, with a limit of its own.

        Raises StaleAttempt.
        """
        return self._end_attempt(attempt, recovery.returned_attempt_args(reason))

    def progress(self, attempt: Attempt, progress: Progress) -> None:
        """Publish the attempt's progress. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.RUNNING, progress=progress)

    def succeed(self, attempt: Attempt, video: Video, timings: StageTimings) -> None:
        """End the job with its video. Raises StaleAttempt: the video is then not the job's."""
        self._write_attempt(attempt, JobState.SUCCEEDED, video=video, timings=timings)

    def fail(self, attempt: Attempt, failure: Failure) -> None:
        """End the job with a failure. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.FAILED, failure.code, failure=failure)

    def cancelled(self, attempt: Attempt) -> None:
        """End the job as cancelled, once the device has stopped. Raises StaleAttempt."""
        self._write_attempt(attempt, JobState.CANCELLED)

    def cancel_requested(self, attempt: Attempt) -> bool:
        """Return whether the attempt should stop; cheaper than `renew`, and keeps the lease.

        Raises:
            StaleAttempt: the job has ended, or a newer attempt owns it: stop, too.
        """
        token, state, requested = self._redis.hmget(
            redis_keys.record(attempt.job_id), ["token", "state", "cancel_requested"]
        )
        if token != attempt.token.encode() or state != JobState.RUNNING.encode():
            raise _stale(attempt, "it has ended, has expired, or a newer attempt owns it")
        return requested == b"1"

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job: at once if it is queued; if it runs, its worker is asked to stop.

        Cancelling a cancelled job changes nothing.

        Raises:
            JobNotFound: there is no such job.
            JobNotCancellable: it has succeeded or failed.
            RecordUnreadable: see `jobs.record.decode`; nothing was changed.
        """
        # First, so that an unreadable record raises before anything was changed.
        self.get(job_id)
        answer = self._cancel(*_id_and_now(job_id))
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
        """Delete everything about a job in Redis, but not its video; return whether it is deleted.

        A running job is cancelled first: it can no longer be read, and its id is put into
        `redis_keys.DELETIONS` when it has ended. Purging a missing job is no error.
        """
        return bool(self._purge(*_id_and_now(ids.checked(job_id))) != b"marked")

    def _fields(self, job_id: str) -> dict[bytes, bytes]:
        """Read the hash of a record; empty if there is none, or it is to be deleted."""
        fields = cast("dict[bytes, bytes]", self._redis.hgetall(redis_keys.record(job_id)))
        return {} if b"delete_requested" in fields else fields

    def _end_attempt(self, attempt: Attempt, counted: recovery.AttemptArgs) -> JobState:
        rq_fields = rq_entry.rq_fields_again(self._redis, attempt.job_id)
        if rq_fields is None:
            raise _stale(attempt, "it is gone")
        answer = self._put_back(*_id_and_now(attempt.job_id), attempt.token, *counted, *rq_fields)
        if answer in (b"missing", b"superseded"):
            raise _stale(attempt, f"the record says {answer.decode()}")
        return JobState(answer.decode())

    def get_for(self, attempt: Attempt) -> JobRecord:
        """Read the record of an attempt's job, also if the job is to be deleted after the attempt.

        Raises:
            StaleAttempt: the record no longer exists.
            RecordUnreadable: see `jobs.record.decode`.
        """
        fields = cast("dict[bytes, bytes]", self._redis.hgetall(redis_keys.record(attempt.job_id)))
        if not fields:
            raise _stale(attempt, "it is gone")
        return record.decode(attempt.job_id, fields)

    def _write_attempt(
        self, attempt: Attempt, target: JobState, code: str = "", **values: BaseModel
    ) -> None:
        fields = [text for name, each in values.items() for text in (name, each.model_dump_json())]
        answer = self._write(
            *_id_and_now(attempt.job_id), attempt.token, target.value, code, *fields
        )
        if answer != b"ok":
            raise _stale(attempt, f"the record says {answer.decode()}")


def new_token() -> str:
    """Make a token, which proves that an attempt owns its job."""
    return secrets.token_hex(16)


def _id_and_now(job_id: str) -> tuple[str, str]:
    """Return the first arguments of most scripts: the job's id and the current time."""
    return job_id, record.now().isoformat()


def _stale(attempt: Attempt, why: str) -> StaleAttempt:
    return StaleAttempt(
        f"Attempt {attempt.number} no longer owns job {attempt.job_id}: {why}.",
        job_id=attempt.job_id,
        attempt=attempt.number,
    )
