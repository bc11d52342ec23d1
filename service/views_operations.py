"""What operators see: the JSON of workers and queues."""

from datetime import datetime
from typing import Final, Literal, Self

from pydantic import BaseModel, Field

from jobs.catalog import ModeStatus, WorkerOffer, WorkerStatus
from service.fleet import Fleet

_SAID: Final = (
    "job_id",
    "jobs_done",
    "memory_allocated_bytes",
    "memory_peak_bytes",
    "memory_total_bytes",
)


class WorkerStateView(BaseModel):
    """A live worker. What it does not say of itself is null."""

    id: str
    model: str
    device: str
    queue: str
    modes: dict[str, ModeStatus] = Field(description="What was measured in each of its modes.")
    started_at: datetime
    state: Literal["idle", "busy", "draining", "unknown"]
    job_id: str | None = Field(description="The job in hand.")
    jobs_done: int | None = Field(description="Jobs it has ended with a video.")
    memory_allocated_bytes: int | None = Field(description="Of the device; null on a CPU.")
    memory_peak_bytes: int | None
    memory_total_bytes: int | None

    @classmethod
    def of(cls, offer: WorkerOffer, status: WorkerStatus | None) -> Self:
        measured = {} if status is None else status.modes
        return cls(
            id=offer.worker_id,
            model=offer.model.name,
            device=offer.device,
            queue=offer.queue,
            modes={mode.name: measured.get(mode.name, ModeStatus()) for mode in offer.modes},
            started_at=offer.started_at,
            state="unknown" if status is None else status.state,
            **{name: getattr(status, name, None) for name in _SAID},
        )


class QueueStateView(BaseModel):
    name: str
    model: str
    waiting: int
    oldest_age_s: float = Field(description="Since when its oldest job exists; 0 if it is empty.")
    workers: int = Field(description="Live workers that take jobs from it.")


class FleetView(BaseModel):
    """The live workers, and the queues in which something waits or for which one is live."""

    workers: list[WorkerStateView]
    queues: list[QueueStateView]

    @classmethod
    def of(cls, fleet: Fleet) -> Self:
        return cls(
            workers=[WorkerStateView.of(offer, status) for offer, status in fleet.workers],
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
