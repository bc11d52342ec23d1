"""Read which jobs failed lately, and why, from the list that the scripts keep in Redis."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from redis import Redis

from jobs import redis_keys
from service.monitoring.fleet_details import Shape, parse_shape

MOST: Final = 1000
"""The most failures of one answer; more are only counted."""


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job that failed."""

    id: str
    code: str
    detail: str
    failed_at: datetime
    owner: str
    worker: str | None
    attempts: int
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Failures:
    """The latest failures, newest first, and how many there were in all since then.

    Jobs that were deleted meanwhile are counted and not listed.
    """

    jobs: Sequence[FailedJob]
    total: int


def read_failures(redis: Redis, since: datetime, most: int = MOST) -> Failures:
    """Read the jobs that failed since then; those of the last week are known, 10,000 at most."""
    least = int(since.timestamp() * 1000)
    with redis.pipeline(transaction=False) as pipe:
        pipe.zcount(redis_keys.FAILURES, least, "+inf")
        pipe.zrevrangebyscore(
            redis_keys.FAILURES, "+inf", least, start=0, num=most, withscores=True
        )
        total, latest = pipe.execute()
    with redis.pipeline(transaction=False) as pipe:
        for name, _ in latest:
            pipe.hmget(redis_keys.record(name.decode()), _FIELDS)
        records = pipe.execute()
    found = (
        _failed(name.decode(), ended_ms, values)
        for (name, ended_ms), values in zip(latest, records, strict=True)
    )
    return Failures([each for each in found if each is not None], total)


_FIELDS: Final = ("failure", "owner", "worker", "attempts", "shape")


def _failed(job_id: str, ended_ms: float, values: Sequence[bytes | None]) -> FailedJob | None:
    failure, owner, worker, attempts, shape = values
    try:
        why = json.loads(failure or b"")
        return FailedJob(
            id=job_id,
            code=str(why["code"]),
            detail=str(why["detail"]),
            failed_at=datetime.fromtimestamp(ended_ms / 1000, UTC),
            owner=(owner or b"").decode(),
            worker=None if worker is None else worker.decode(),
            attempts=int(attempts or 0),
            shape=parse_shape(shape),
        )
    except (ValueError, KeyError, TypeError):
        return None  # deleted meanwhile, or of another version
