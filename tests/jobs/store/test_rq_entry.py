"""Test that RQ's hash of a job is what RQ itself would have written."""

from datetime import UTC, datetime, timedelta

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs.store.rq_entry import TASK, rq_fields


def test_rq_reads_its_own_job_from_the_fields(redis: Redis) -> None:
    queue = Queue("q", connection=redis, serializer=JSONSerializer)
    own = queue.enqueue(TASK, "id-1", job_id="id-1", job_timeout=77)
    fields = rq_fields("id-2", "q", 77)
    redis.hset(Job.key_for("id-2"), mapping=dict(zip(fields[::2], fields[1::2], strict=True)))
    ours = Job.fetch("id-2", connection=redis, serializer=JSONSerializer)
    assert (ours.func_name, ours.args, ours.kwargs) == (own.func_name, ["id-2"], own.kwargs)
    assert (ours.origin, ours.timeout, ours.get_status()) == ("q", 77, own.get_status())
    assert set(own.to_dict()) <= set(ours.to_dict())
    now = datetime.now(UTC)
    for at in (ours.created_at, ours.enqueued_at):
        assert at is not None
        assert now - timedelta(seconds=5) < at.replace(tzinfo=UTC) <= now + timedelta(seconds=1)


def test_jobs_that_share_a_pattern_keep_their_own_ids(redis: Redis) -> None:
    for name in ("a", "b"):
        fields = rq_fields(name, "q", 60)
        redis.hset(Job.key_for(name), mapping=dict(zip(fields[::2], fields[1::2], strict=True)))
    jobs = Job.fetch_many(["a", "b"], connection=redis, serializer=JSONSerializer)
    assert [job.args for job in jobs if job is not None] == [["a"], ["b"]]


def test_another_deadline_is_another_pattern() -> None:
    by_deadline = [rq_fields("a", "q", deadline) for deadline in (60, 61)]
    found = [dict(zip(fields[::2], fields[1::2], strict=True)) for fields in by_deadline]
    assert [fields["timeout"] for fields in found] == ["60", "61"]
