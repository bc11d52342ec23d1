"""Build RQ's hash of a job, through which RQ delivers the job's id to a worker.

RQ delivers the id and nothing else. The record says who owns a job, how it ended and whether it
must be delivered again, so RQ's own retries and registries are not used.
"""

import zlib
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, cast

from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from jobs import record, redis_keys
from jobs.record import JobRecord

TASK = "worker.tasks.generate"
"""The function that RQ calls; queued jobs contain this name, so it must not change."""

UNKNOWN_DEADLINE_S: Final = 3600
"""Used if a record's deadline cannot be read. RQ requires a timeout, but it ends no job here."""

RqFields = list[str | bytes]


def both_hashes(job: JobRecord) -> RqFields:
    """Return the id of a new job, and the fields of its record and of RQ's, with their numbers."""
    fields = [text for field in record.encode_new(job).items() for text in field]
    of_rq = rq_fields(job.id, job.queue, job.deadline_s)
    return [job.id, str(len(fields)), *fields, str(len(of_rq)), *of_rq]


def rq_fields(job_id: str, queue: str, deadline_s: int) -> RqFields:
    """Return RQ's hash for a job that is about to be queued, as alternating fields and values."""
    now = utcformat(datetime.now(UTC))
    fields = _shared_fields(queue, deadline_s) | {
        "created_at": now,
        "enqueued_at": now,
        "data": zlib.compress(JSONSerializer.dumps((TASK, None, (job_id,), {}))),
    }
    return [each for field in fields.items() for each in field]


@lru_cache(maxsize=256)
def _shared_fields(queue: str, deadline_s: int) -> dict[str, str | bytes]:
    """Return the fields that all jobs share; cached, as RQ needs 0.1 ms to make them."""
    rq_job = Job.create(
        TASK,
        args=("",),
        connection=Redis(),  # required, and never used
        id="pattern",
        origin=queue,
        timeout=deadline_s,
        result_ttl=redis_keys.RQ_RESULT_TTL_S,
        failure_ttl=redis_keys.RQ_FAILURE_TTL_S,
        description=TASK,
        status=JobStatus.QUEUED,
        serializer=JSONSerializer,
    )
    fields: dict[str, str | bytes] = {}
    for name, value in rq_job.to_dict().items():
        if isinstance(value, JobStatus):
            value = value.value  # noqa: PLW2901
        fields[name] = value if isinstance(value, bytes) else str(value)
    return fields


def rq_fields_again(redis: Redis, job_id: str) -> RqFields | None:
    """Return RQ's hash for a job that has a record; None if it has none.

    Reads only two fields of the record: a job of another version must reach a worker, too, which
    then fails it.
    """
    queue, deadline = cast(
        "list[bytes | None]", redis.hmget(redis_keys.record(job_id), ["queue", "deadline_s"])
    )
    if queue is None:
        return None
    known = deadline is not None and deadline.isdigit() and int(deadline) > 0
    deadline_s = int(deadline or 0) if known else UNKNOWN_DEADLINE_S
    return rq_fields(job_id, queue.decode(errors="replace"), deadline_s)
