"""The RQ side of a job: the hash and the queue entry through which it reaches a worker.

RQ carries an id to a worker and no more. Who owns a job, what became of it and whether it must be
delivered again stands in our record, so RQ's own retries and registries are not used.
"""

from datetime import UTC, datetime

from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from jobs import keys
from jobs.record import JobRecord

TASK = "worker.tasks.generate"


def rq_fields(redis: Redis, job: JobRecord) -> list[str | bytes]:
    """The fields and values of RQ's hash of a job that is about to be queued; sends nothing."""
    rq_job = Job.create(
        TASK,
        args=(job.id,),
        connection=redis,
        id=job.id,
        origin=job.queue,
        timeout=job.deadline_s,
        result_ttl=keys.RQ_RESULT_TTL_S,
        failure_ttl=keys.RQ_FAILURE_TTL_S,
        description=TASK,
        status=JobStatus.QUEUED,
        serializer=JSONSerializer,
    )
    rq_job.enqueued_at = datetime.now(UTC)
    fields: list[str | bytes] = []
    for name, value in rq_job.to_dict().items():
        if isinstance(value, JobStatus):
            value = value.value  # noqa: PLW2901
        fields += [name, value if isinstance(value, bytes) else str(value)]
    return fields
