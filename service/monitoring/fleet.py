"""Read the state of queues, jobs and workers at one moment."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from redis import Redis
from rq import Queue

from jobs import catalog, ids, redis_keys
from jobs.catalog import WorkerOffer
from jobs.redis_client import server_time_s
from jobs.state import JobState
from jobs.store.workers import (
    DrainOrder,
    WorkerStateName,
    WorkerStatus,
    read_orders,
    read_statuses,
)


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of one queue. A queue's name begins with that of its model.

    Attributes:
        waiting_ids: the jobs that wait, the next first.
    """

    name: str
    waiting_ids: tuple[str, ...]
    oldest_age_s: float
    workers: int

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self.waiting_ids)

    @property
    def model(self) -> str:
        """The name of the model whose jobs wait in it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The state of one worker.

    Attributes:
        offer: what it offers, or would if it took jobs; None if it does not say.
        status: what it said of itself last, if it said anything.
        order: the order to take no jobs that it is under.
        seen_s: when it published something last, in Unix seconds of Redis' clock.
    """

    id: str
    offer: WorkerOffer | None
    status: WorkerStatus | None
    order: DrainOrder | None = None
    seen_s: float | None = None

    @property
    def model(self) -> str:
        """The name of its model; without an offer, from its id."""
        return self.id.rpartition(".")[0] if self.offer is None else self.offer.model.name

    @property
    def device(self) -> str:
        """The name of its device; empty without an offer."""
        return "" if self.offer is None else self.offer.device

    @property
    def state(self) -> Literal[WorkerStateName, "unknown"]:
        """The state in its last status; `draining` as soon as it is ordered to take no jobs."""
        if self.status is None:
            return "unknown"
        ordered = self.order is not None and self.status.takes_jobs
        return "draining" if ordered else self.status.state


@dataclass(frozen=True, slots=True)
class Fleet:
    """The state of all queues, jobs and workers."""

    queues: Sequence[QueueState]
    jobs: Mapping[JobState, int]
    webhooks_due: int
    workers: Sequence[WorkerState]


def snapshot(redis: Redis) -> Fleet:
    """Read the state as it is now. Ages are measured by Redis' clock."""
    offers = {offer.worker_id: offer for offer in catalog.read(redis).offers}
    statuses = {status.worker_id: status for status in read_statuses(redis)}
    states = list(JobState)
    with redis.pipeline(transaction=False) as pipe:
        for state in states:
            pipe.zcard(redis_keys.index(state))
        pipe.zcard(redis_keys.WEBHOOKS_DUE)
        pipe.zrange(redis_keys.WORKERS, 0, -1, withscores=True)
        *counts, webhooks_due, seen = pipe.execute()
    seen_s = {name.decode(errors="replace"): second for name, second in seen}
    names = sorted(offers.keys() | statuses.keys())
    orders = read_orders(redis, names)
    return Fleet(
        queues=_queues(redis, Counter(offer.queue for offer in offers.values())),
        jobs=dict(zip(states, counts, strict=True)),
        webhooks_due=webhooks_due,
        workers=[
            WorkerState(
                name,
                offers.get(name) or _withheld(statuses.get(name)),
                statuses.get(name),
                orders.get(name),
                seen_s.get(name),
            )
            for name in names
        ],
    )


def _withheld(status: WorkerStatus | None) -> WorkerOffer | None:
    return None if status is None else status.withheld


def _queues(redis: Redis, workers: Counter[str]) -> list[QueueState]:
    """List the queues in which a job waits or for which a worker is live."""
    known = {queue.name for queue in Queue.all(connection=redis)} | set(workers)
    now_s = server_time_s(redis)
    found = []
    for name in sorted(known):
        key = Queue(name, connection=redis).key
        waiting = [cast("bytes", each).decode() for each in redis.lrange(key, 0, -1)]
        # The first in the list need not be the oldest: jobs with priority, and second attempts, go
        # before older jobs.
        created = [at for each in waiting if (at := ids.timestamp_of(each)) is not None]
        age_s = max(0.0, now_s - min(created, default=now_s))
        if waiting or workers[name]:
            found.append(QueueState(name, tuple(waiting), age_s, workers[name]))
    return found
