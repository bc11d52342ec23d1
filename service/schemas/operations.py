"""Define the JSON of workers and queues that operators see."""

from datetime import datetime
from typing import Final, Literal, Self

from pydantic import BaseModel, Field

from jobs.catalog import ModeOffer
from jobs.store.workers import ModeStatus, WorkerStateName
from service.monitoring.fleet import Fleet, WorkerState

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


class WorkerStateView(BaseModel):
    """The state of a worker; values that are unknown are null."""

    id: str
    model: str
    state: Literal[WorkerStateName, "unknown"] = Field(
        description="draining: it takes no more jobs, and ends its last. degraded: it takes none "
        "until it has proven that it can end one."
    )
    fault: str | None = Field(description="What is wrong with a worker that is degraded.")
    device: str | None
    queue: str | None
    modes: dict[str, WorkerModeView]
    started_at: datetime | None
    job_id: str | None = Field(description="The job that it runs.")
    jobs_done: int | None = Field(description="Jobs that it completed with a video.")
    memory_allocated_bytes: int | None = Field(description="Of the device; null on a CPU.")
    memory_peak_bytes: int | None
    memory_total_bytes: int | None

    @classmethod
    def of(cls, worker: WorkerState) -> Self:
        """Build the view of one worker."""
        offered = {} if worker.offer is None else {m.name: m for m in worker.offer.modes}
        measured = {} if worker.status is None else worker.status.modes
        return cls(
            id=worker.id,
            model=worker.model,
            state=worker.state,
            modes={
                name: WorkerModeView.of(offered.get(name), measured.get(name))
                for name in (offered | measured)
            },
            **{name: getattr(worker.offer, name, None) for name in _OFFER_FIELDS},
            **{name: getattr(worker.status, name, None) for name in _STATUS_FIELDS},
        )


class QueueStateView(BaseModel):
    """The state of a queue."""

    name: str
    model: str
    waiting: int
    oldest_age_s: float = Field(description="Since when its oldest job exists; 0 if it is empty.")
    workers: int = Field(description="Live workers that take jobs from it.")


class FleetView(BaseModel):
    """The workers, and the queues in which a job waits or for which a worker is live."""

    workers: list[WorkerStateView]
    queues: list[QueueStateView]

    @classmethod
    def of(cls, fleet: Fleet) -> Self:
        """Build the view of all workers and queues."""
        return cls(
            workers=[WorkerStateView.of(worker) for worker in fleet.workers],
            queues=[
                QueueStateView(
                    name=queue.name,
                    model=queue.model,
                    waiting=queue.waiting,
                    oldest_age_s=round(queue.oldest_age_s, 3),
                    workers=queue.workers,
                )
                for queue in fleet.queues
            ],
        )
