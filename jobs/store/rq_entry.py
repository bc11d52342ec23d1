"""The RQ side of a job: the hash and the queue entry through which it reaches a worker.

RQ carries an id to a worker and no more. Who owns a job, what became of it and whether it must be
delivered again stands in our record, so RQ's own retries and registries are not used.
"""

import zlib
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, cast

from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from jobs import redis_keys

TASK = "worker.tasks.generate"

UNKNOWN_DEADLINE_S: Final = 3600
"""Of a record whose own cannot be read. RQ's limit ends no job here; it only has to have one."""

RqFields = list[str | bytes]


def rq_fields(job_id: str, queue: str, deadline_s: int) -> RqFields:
    """The fields and values of RQ's hash of a job that is about to be queued; sends nothing."""
    now = utcformat(datetime.now(UTC))
    fields = _shared_fields(queue, deadline_s) | {
        "created_at": now,
        "enqueued_at": now,
        "data": zlib.compress(JSONSerializer.dumps((TASK, None, (job_id,), {}))),
    }
    return [each for field in fields.items() for each in field]


@lru_cache(maxsize=256)
def _shared_fields(queue: str, deadline_s: int) -> dict[str, str | bytes]:
    """What RQ writes of every such job: asking it anew for each costs a tenth of a millisecond."""
    rq_job = Job.create(
        TASK,
        args=("",),
        connection=Redis(),  # asked for, and never used
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
    """The same for a job that is there already; None if it is not.

    Reads no more of the record than it needs: one of another version has to reach a worker, too,
    which then ends it.
    """
    queue, deadline = cast(
        "list[bytes | None]", redis.hmget(redis_keys.record(job_id), ["queue", "deadline_s"])
    )
    if queue is None:
        return None
    known = deadline is not None and deadline.isdigit() and int(deadline) > 0
    deadline_s = int(deadline or 0) if known else UNKNOWN_DEADLINE_S
    return rq_fields(job_id, queue.decode(errors="replace"), deadline_s)
