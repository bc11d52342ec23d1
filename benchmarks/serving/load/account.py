"""Keep account of the jobs that a load has had accepted, and compare it with Redis at the end."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis import Redis
from rq import Queue

from jobs import redis_keys
from jobs.state import JobState

BATCH = 1000
LOOKS_AGAIN = 3
PAUSE_S = 1.0


class Account:
    """The ids of accepted jobs, by their owners."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[str]] = defaultdict(list)

    def accept(self, owner: str, job_ids: Iterable[str]) -> None:
        """Add jobs that were answered with 202."""
        self._jobs[owner] += job_ids

    def any_of(self, owner: str) -> str:
        """Return one of an owner's jobs."""
        return random.choice(self._jobs[owner])

    def newest_of(self, owner: str) -> str:
        """Return the owner's newest job."""
        return self._jobs[owner][-1]

    def all(self) -> list[str]:
        """Return all jobs."""
        return [job_id for each in self._jobs.values() for job_id in each]


@dataclass(frozen=True, slots=True)
class Check:
    """What became of the accepted jobs.

    Attributes:
        lost: have no record, or wait in no queue and run nowhere.
        doubled: have ended more than once, or are in a queue more than once.
    """

    accepted: int
    ended: int
    open: int
    lost: int
    doubled: int


def check_jobs(redis: Redis, account: Account) -> Check:
    """Look for every accepted job, while workers go on."""
    accepted = account.all()
    states = _states(redis, accepted)
    in_queues = _in_queues(redis)
    ended = [job_id for job_id, state in states.items() if _has_ended(state)]
    ends = _ends(redis, ended)
    doubled = {job_id for job_id, number in in_queues.items() if number > 1 and job_id in states}
    doubled |= {job_id for job_id, number in ends.items() if number != 1}
    lost = {job_id for job_id in accepted if _is_missing(states[job_id], in_queues[job_id])}
    for _ in range(LOOKS_AGAIN):
        # A worker has taken some of them between the two looks, or is about to claim them.
        time.sleep(PAUSE_S)
        in_queues, again = _in_queues(redis), _states(redis, list(lost))
        lost = {job_id for job_id in lost if _is_missing(again[job_id], in_queues[job_id])}
    waiting = len(accepted) - len(ended) - len(lost)
    return Check(len(accepted), len(ended), waiting, len(lost), len(doubled))


def _is_missing(state: str | None, in_queues: int) -> bool:
    return state is None or (state == JobState.QUEUED and not in_queues)


def _has_ended(state: str | None) -> bool:
    return state is not None and JobState(state).is_terminal


def _states(redis: Redis, job_ids: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for batch in _batches(job_ids):
        with redis.pipeline(transaction=False) as pipe:
            for job_id in batch:
                pipe.hget(redis_keys.record(job_id), "state")
            states = pipe.execute()
        found |= {i: s and s.decode() for i, s in zip(batch, states, strict=True)}
    return found


def _in_queues(redis: Redis) -> Counter[str]:
    """Count how often each id is in a queue, or on its way from one to a worker."""
    found: Counter[str] = Counter()
    names: Any = redis.smembers(Queue.redis_queues_keys)
    for name in names:
        for key in (name, name + b":intermediate"):
            waiting: Any = redis.lrange(key, 0, -1)
            found.update(each.decode() for each in waiting)
    return found


def _ends(redis: Redis, job_ids: list[str]) -> dict[str, int]:
    """Count the ends in each job's event stream."""
    found: dict[str, int] = {}
    for batch in _batches(job_ids):
        with redis.pipeline(transaction=False) as pipe:
            for job_id in batch:
                pipe.xrange(redis_keys.events(job_id))
            streams = pipe.execute()
        for job_id, entries in zip(batch, streams, strict=True):
            states = [fields[b"state"].decode() for _, fields in entries]
            found[job_id] = sum(JobState(state).is_terminal for state in states)
    return found


def _batches(job_ids: list[str]) -> Iterable[list[str]]:
    return (job_ids[at : at + BATCH] for at in range(0, len(job_ids), BATCH))
