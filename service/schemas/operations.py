"""Define the JSON of workers and queues that operators see."""

from datetime import UTC, datetime
from typing import Final, Literal, Self

from pydantic import BaseModel, Field

from jobs.catalog import ModeOffer
from jobs.record import Progress
from jobs.store.workers import DrainOrder, ModeStatus, WorkerStateName
from service.monitoring.fleet import Fleet, WorkerState
from service.monitoring.fleet_details import FleetDetails, RunningJob, Shape, WaitingShape

_OFFER_FIELDS: Final = ("device", "queue", "started_at")
_STATUS_FIELDS: Final = (
    "fault",
    "job_id",
    "jobs_done",
    "memory_allocated_bytes",
    "memory_peak_bytes",
    "memory_total_bytes",
)


class WorkerModeView(ModeStatus):
    """One of a worker's modes: how it runs there, and what was measured."""

    kernels: str | None = Field(default=None, description="What it runs on.")
    warning: str | None = Field(
        default=None, description="Why that is not the device's fastest, if it is not."
    )

    @classmethod
    def of(cls, offer: ModeOffer | None, status: ModeStatus | None) -> Self:
        """Build the view of one mode from what the worker offers and has measured."""
        measured = {} if status is None else status.model_dump()
        if offer is not None:
            measured |= {"kernels": offer.kernels, "warning": offer.warning}
        return cls(**measured)


class ShapeView(BaseModel):
    """What the time of a job depends on, apart from its steps."""

    model: str
    mode: str
    size: str
    num_frames: int
    guided: bool = Field(description="Whether guidance doubles the work.")

    @classmethod
    def of(cls, shape: Shape) -> Self:
        """Build the view of a shape."""
        return cls(**{name: getattr(shape, name) for name in cls.model_fields})


class RunningJobView(BaseModel):
    """The job that a worker runs."""

    id: str
    owner: str
    shape: ShapeView | None
    progress: Progress | None
    attempts: int
    started_at: datetime | None

    @classmethod
    def of(cls, job: RunningJob) -> Self:
        """Build the view of a running job."""
        names = ("id", "owner", "progress", "attempts", "started_at")
        shape = None if job.shape is None else ShapeView.of(job.shape)
        return cls(shape=shape, **{name: getattr(job, name) for name in names})


class WorkerStateView(BaseModel):
    """The state of a worker; values that are unknown are null."""

    id: str
    model: str
    state: Literal[WorkerStateName, "unknown"] = Field(
        description="draining: it takes no more jobs, and ends its last. drained: it takes none "
        "until it is told to resume. degraded: it takes none until it has proven that it can end "
        "one."
    )
    drain: DrainOrder | None = Field(description="The order to take no jobs that it is under.")
    seen_at: datetime | None = Field(
        description="When it gave its last sign of life; it gives one every 5 s."
    )
    fault: str | None = Field(description="What is wrong with a worker that is degraded.")
    device: str | None
    queue: str | None
    modes: dict[str, WorkerModeView]
    started_at: datetime | None
    job_id: str | None = Field(description="The job that it runs.")
    job: RunningJobView | None = Field(description="The same job, as it is now.")
    jobs_done: int | None = Field(description="Jobs that it completed with a video.")
    memory_allocated_bytes: int | None = Field(description="Of the device; null on a CPU.")
    memory_peak_bytes: int | None
    memory_total_bytes: int | None

    @classmethod
    def of(cls, worker: WorkerState, running: RunningJob | None = None) -> Self:
        """Build the view of one worker and of the job that it runs."""
        offered = {} if worker.offer is None else {m.name: m for m in worker.offer.modes}
        measured = {} if worker.status is None else worker.status.modes
        return cls(
            id=worker.id,
            model=worker.model,
            state=worker.state,
            drain=worker.order,
            seen_at=None if worker.seen_s is None else datetime.fromtimestamp(worker.seen_s, UTC),
            job=None if running is None else RunningJobView.of(running),
            modes={
                name: WorkerModeView.of(offered.get(name), measured.get(name))
                for name in (offered | measured)
            },
            **{name: getattr(worker.offer, name, None) for name in _OFFER_FIELDS},
            **{name: getattr(worker.status, name, None) for name in _STATUS_FIELDS},
        )


class AgesView(BaseModel):
    """How many jobs wait for how long, since their creation."""

    under_1_min: int = 0
    under_10_min: int = 0
    under_1_h: int = 0
    over_1_h: int = 0


class WaitingShapeView(ShapeView):
    """The jobs of one shape that wait in a queue."""

    waiting: int
    oldest_age_s: float
    ages: AgesView

    @classmethod
    def of_group(cls, group: WaitingShape) -> Self:
        """Build the view of the jobs of one shape."""
        return cls(
            waiting=group.waiting,
            oldest_age_s=round(group.oldest_age_s, 3),
            ages=AgesView(**group.ages),
            **ShapeView.of(group.shape).model_dump(),
        )


class QueueStateView(BaseModel):
    """The state of a queue."""

    name: str
    model: str
    waiting: int
    oldest_age_s: float = Field(description="Since when its oldest job exists; 0 if it is empty.")
    workers: int = Field(description="Live workers that take jobs from it.")
    shapes: list[WaitingShapeView] = Field(
        description="What waits in it, the shape with the oldest job first."
    )


class FleetView(BaseModel):
    """The workers, and the queues in which a job waits or for which a worker is live."""

    workers: list[WorkerStateView]
    queues: list[QueueStateView]

    @classmethod
    def of(cls, fleet: Fleet, details: FleetDetails) -> Self:
        """Build the view of all workers and queues."""
        running = details.running
        return cls(
            workers=[
                WorkerStateView.of(each, running.get((each.status and each.status.job_id) or ""))
                for each in fleet.workers
            ],
            queues=[
                QueueStateView(
                    name=queue.name,
                    model=queue.model,
                    waiting=queue.waiting,
                    oldest_age_s=round(queue.oldest_age_s, 3),
                    workers=queue.workers,
                    shapes=[WaitingShapeView.of_group(g) for g in details.waiting[queue.name]],
                )
                for queue in fleet.queues
            ],
        )
