"""Read the details of the fleet that operators see: running jobs, and what waits by shape."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from pydantic import ValidationError
from redis import Redis

from jobs import ids, redis_keys
from jobs.record import Progress
from jobs.redis_client import server_time_s
from service.monitoring.fleet import Fleet

AGES: Final = {"under_1_min": 60.0, "under_10_min": 600.0, "under_1_h": 3600.0}
"""Classes of waiting jobs by age, each with its upper bound in seconds; older ones are `over_1_h`.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the time of a job depends on, apart from its steps."""

    model: str
    mode: str
    size: str
    num_frames: int
    guided: bool


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker runs."""

    id: str
    owner: str
    shape: Shape | None
    progress: Progress | None
    attempts: int
    started_at: datetime | None


@dataclass(frozen=True, slots=True)
class WaitingShape:
    """The jobs of one shape that wait in a queue; `ages` counts them by AGES and `over_1_h`."""

    shape: Shape
    waiting: int
    oldest_age_s: float
    ages: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FleetDetails:
    """The running jobs by id, and the waiting shapes by the name of their queue."""

    running: Mapping[str, RunningJob]
    waiting: Mapping[str, Sequence[WaitingShape]]


class WaitingShapes:
    """Remembers the shapes of waiting jobs, which never change, from one look to the next.

    A queue of 10,000 jobs would take a process a third of a second, and operators look every few
    seconds. It holds the jobs that waited at the latest look, and is safe to share between threads.
    """

    def __init__(self) -> None:
        self._known: Mapping[str, Shape | None] = {}

    def unknown(self, waiting: Sequence[str]) -> Sequence[str]:
        """Return the jobs whose shapes have to be read."""
        known = self._known
        return [job_id for job_id in waiting if job_id not in known]

    def of(
        self, waiting: Sequence[str], read: Mapping[str, Shape | None]
    ) -> Mapping[str, Shape | None]:
        """Return the shapes of these, some of which were just read; forget those of other jobs.

        A job that another thread has forgotten meanwhile is left out, and read the next time.
        """
        known = self._known
        self._known = {
            job_id: (read if job_id in read else known)[job_id]
            for job_id in waiting
            if job_id in read or job_id in known
        }
        return self._known


def read_details(redis: Redis, fleet: Fleet, shapes_before: WaitingShapes) -> FleetDetails:
    """Read the details of a state that was read a moment ago; jobs may be gone meanwhile."""
    running = [each.status.job_id for each in fleet.workers if each.status and each.status.job_id]
    waiting = [job_id for queue in fleet.queues for job_id in queue.waiting_ids]
    unknown = shapes_before.unknown(waiting)
    with redis.pipeline(transaction=False) as pipe:
        for job_id in running:
            pipe.hmget(redis_keys.record(job_id), _RUNNING)
        for job_id in unknown:
            pipe.hget(redis_keys.record(job_id), "shape")
        found = pipe.execute()
    read = dict(zip(unknown, map(parse_shape, found[len(running) :]), strict=True))
    shapes = shapes_before.of(waiting, read)
    now_s = server_time_s(redis)
    return FleetDetails(
        running={
            job_id: job
            for job_id, values in zip(running, found[: len(running)], strict=True)
            if (job := _running(job_id, values)) is not None
        },
        waiting={each.name: _grouped(each.waiting_ids, shapes, now_s) for each in fleet.queues},
    )


_RUNNING: Final = ("owner", "shape", "progress", "attempts", "started_at")


@lru_cache(maxsize=1024)
def parse_shape(text: bytes | None) -> Shape | None:
    """Parse the field `shape` of a record; None for one of another form."""
    try:
        model, mode, size, frames, guided = (text or b"").decode().split("|")
        return Shape(model, mode, size, int(frames), guided == "1")
    except ValueError:
        return None


def _running(job_id: str, values: Sequence[bytes | None]) -> RunningJob | None:
    owner, shape, progress, attempts, started = values
    if owner is None:
        return None
    try:
        return RunningJob(
            id=job_id,
            owner=owner.decode(),
            shape=parse_shape(shape),
            progress=None if progress is None else Progress.model_validate_json(progress),
            attempts=int(attempts or 0),
            started_at=None if started is None else datetime.fromisoformat(started.decode()),
        )
    except (ValueError, ValidationError):
        return None  # of another version


def _grouped(
    names: Sequence[str], shapes: Mapping[str, Shape | None], now_s: float
) -> Sequence[WaitingShape]:
    """Group the jobs of a queue by shape, the shape with the oldest job first."""
    ages: dict[Shape, list[float]] = defaultdict(list)
    for name in names:
        shape, made_at = shapes.get(name), ids.timestamp_of(name)
        if shape is not None:
            ages[shape].append(max(0.0, now_s - (now_s if made_at is None else made_at)))
    groups = [
        WaitingShape(shape, len(each), max(each), Counter(map(_age_class, each)))
        for shape, each in ages.items()
    ]
    return sorted(groups, key=lambda group: -group.oldest_age_s)


def _age_class(age_s: float) -> str:
    return next((name for name, bound in AGES.items() if age_s < bound), "over_1_h")
