"""Simulate one queue and its workers, event by event.

It does what `jobs/store` does. All workers of a model with the same configuration take from one
list, whatever the mode and the shape of a job. A job with priority is put before the first waiting
job without, any other at the end. A worker takes the first job, runs it to its end, and takes the
next. If a worker is lost, its job goes to the very front once its lease has expired and a process
has looked; a job that loses its second worker fails.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.redis_keys import LEASE_S
from jobs.store.recovery import INTERVAL_S, MAX_LOST


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that is asked for at `at_s` and takes a worker for `seconds`."""

    at_s: float
    seconds: float
    priority: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers, with one card each.

    Attributes:
        between_s: what a worker needs from the end of one job to the start of the next.
        losses_per_hour: how often one worker is lost with its process, on average.
        restart_s: from a worker's loss until it is live again.
    """

    cards: int
    between_s: float = 0.0
    losses_per_hour: float = 0.0
    restart_s: float = 60.0

    def __post_init__(self) -> None:
        if self.cards < 1:
            raise ValueError(f"a queue with {self.cards} cards serves nothing; give 1 or more")


@dataclass(frozen=True, slots=True)
class Simulated:
    """What became of the arrivals, in their order.

    Attributes:
        waits_s: from each job's arrival to its first start.
        ends_s: when each job ended.
        failed: how many jobs lost their last worker.
        busy_s: seconds of all workers with a job, also those of attempts that were lost.
        span_s: from the first arrival to the last end.
    """

    waits_s: list[float]
    ends_s: list[float]
    failed: int
    busy_s: float
    span_s: float


class WaitingList:
    """The ids that wait, in the order of Redis' list."""

    def __init__(self) -> None:
        # All that goes before the first job without priority, and the rest from that job on.
        self._before: deque[int] = deque()
        self._rest: deque[int] = deque()
        self._has_priority: set[int] = set()

    def __len__(self) -> int:
        return len(self._before) + len(self._rest)

    def add(self, job: int, priority: bool) -> None:
        """Add a new job, as create.lua does."""
        if priority:
            self._has_priority.add(job)
        (self._before if priority else self._rest).append(job)

    def put_back(self, job: int) -> None:
        """Add a job that lost its worker at the very front, as prelude.lua does."""
        if job in self._has_priority:
            self._before.appendleft(job)
            return
        self._rest.extendleft(reversed(self._before))
        self._before.clear()
        self._rest.appendleft(job)

    def take(self) -> int:
        """Take the first job."""
        if self._before:
            return self._before.popleft()
        job = self._rest.popleft()
        while self._rest and self._rest[0] in self._has_priority:
            self._before.append(self._rest.popleft())
        return job


class _Run:
    """One run over the arrivals: the events to come, and the state of queue and workers."""

    def __init__(self, arrivals: Sequence[Arrival], fleet: Fleet, seed: int) -> None:
        self._arrivals, self._fleet = arrivals, fleet
        self._random = random.Random(seed)
        self._waiting = WaitingList()
        self._idle = fleet.cards
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, int]] = []
        self._lost = [0] * len(arrivals)
        self.starts_s: list[float | None] = [None] * len(arrivals)
        self.ends_s = [0.0] * len(arrivals)
        self.failed = 0
        self.busy_s = 0.0
        self._open = len(arrivals)

    def run(self) -> None:
        for number, arrival in enumerate(self._arrivals):
            self._at(arrival.at_s, "arrive", number)
        while self._open:
            now, _, kind, job = heapq.heappop(self._events)
            if kind == "arrive":
                self._waiting.add(job, self._arrivals[job].priority)
            elif kind == "end":
                self._end(job, now)
                self._at(now + self._fleet.between_s, "free", job)
            elif kind == "put back":
                self._put_back(job, now)
            else:  # a worker is free, or live again
                self._idle += 1
            while self._idle and self._waiting:
                self._idle -= 1
                self._start(self._waiting.take(), now)

    def _at(self, when: float, kind: str, job: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, job))

    def _start(self, job: int, now: float) -> None:
        if self.starts_s[job] is None:
            self.starts_s[job] = now
        seconds = self._arrivals[job].seconds
        lost_after = self._seconds_until_lost()
        if lost_after >= seconds:
            self.busy_s += seconds
            self._at(now + seconds, "end", job)
            return
        self.busy_s += lost_after
        self._lost[job] += 1
        # The lease was renewed at most a second before, and somebody looks every few seconds.
        found_after = LEASE_S + self._random.uniform(0, INTERVAL_S)
        self._at(now + lost_after + found_after, "put back", job)
        self._at(now + lost_after + self._fleet.restart_s, "free", job)

    def _seconds_until_lost(self) -> float:
        """Draw how long a worker lives. Idle ones are not lost: that delays a job by little."""
        if not self._fleet.losses_per_hour:
            return float("inf")
        return self._random.expovariate(self._fleet.losses_per_hour / 3600)

    def _put_back(self, job: int, now: float) -> None:
        if self._lost[job] < MAX_LOST:
            self._waiting.put_back(job)
            return
        self.failed += 1
        self._end(job, now)

    def _end(self, job: int, now: float) -> None:
        self.ends_s[job] = now
        self._open -= 1


def simulate(arrivals: Sequence[Arrival], fleet: Fleet, seed: int = 0) -> Simulated:
    """Run all arrivals through the queue; times are seconds from the arrivals' own zero.

    Raises:
        ValueError: there are no arrivals.
    """
    if not arrivals:
        raise ValueError("there is nothing to simulate: give at least one arrival")
    run = _Run(arrivals, fleet, seed)
    run.run()
    starts = [start for start in run.starts_s if start is not None]
    waits = [start - each.at_s for start, each in zip(starts, arrivals, strict=True)]
    span_s = max(run.ends_s) - min(each.at_s for each in arrivals)
    return Simulated(waits, run.ends_s, run.failed, run.busy_s, span_s)
