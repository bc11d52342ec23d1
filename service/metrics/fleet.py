"""What waits, what runs, and how the workers are doing, as metrics."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from jobs.catalog import ModeStatus, WorkerOffer, WorkerStatus
from service.fleet import Fleet, QueueState

STATES: Final = ("idle", "busy", "draining", "unknown")
"""Of workers; `unknown`: it offers its model and says nothing of itself."""

_MEMORY: Final = {
    "allocated": "Device memory in use.",
    "peak": "The most device memory that was in use at once.",
    "total": "The device's memory.",
}


def families(fleet: Fleet) -> Iterator[Metric]:
    """Turn what was seen into metrics."""
    yield from _queue_families(fleet.queues)
    jobs = GaugeMetricFamily("wan_jobs", "Jobs on record by their state.", labels=["state"])
    for state, number in fleet.jobs.items():
        jobs.add_metric([state], number)
    yield jobs
    yield GaugeMetricFamily(
        "wan_webhooks_due", "Webhooks to be called, now or again later.", fleet.webhooks_due
    )
    yield from _worker_families(fleet.workers)


def _queue_families(queues: Sequence[QueueState]) -> Sequence[Metric]:
    labels = ("queue", "model")
    waiting = GaugeMetricFamily("wan_queue_jobs", "Jobs that wait in a queue.", labels=labels)
    age = GaugeMetricFamily(
        "wan_queue_oldest_age_seconds",
        "Since when the oldest job in a queue exists; 0 for an empty one.",
        labels=labels,
    )
    workers = GaugeMetricFamily(
        "wan_queue_workers", "Live workers that take jobs from a queue.", labels=labels
    )
    for queue in queues:
        named = (queue.name, queue.model)
        waiting.add_metric(named, queue.waiting)
        age.add_metric(named, queue.oldest_age_s)
        workers.add_metric(named, queue.workers)
    return waiting, age, workers


def _worker_families(workers: Sequence[tuple[WorkerOffer, WorkerStatus | None]]) -> list[Metric]:
    states = GaugeMetricFamily(
        "wan_workers", "Live workers by their state.", labels=("model", "state")
    )
    numbers = Counter((o.model.name, s.state if s else "unknown") for o, s in workers)
    for model in sorted({offer.model.name for offer, _ in workers}):
        for state in STATES:
            states.add_metric((model, state), numbers[model, state])
    told = [(offer, status) for offer, status in workers if status is not None]
    done = CounterMetricFamily(
        "wan_worker_jobs_done",
        "Jobs that a worker ended with a video since its start.",
        labels=("worker", "model"),
    )
    for offer, status in told:
        done.add_metric((status.worker_id, offer.model.name), status.jobs_done)
    return [states, done, *_memory(told), *_modes(told)]


def _memory(told: Sequence[tuple[WorkerOffer, WorkerStatus]]) -> Iterator[Metric]:
    for kind, text in _MEMORY.items():
        family = GaugeMetricFamily(
            f"wan_worker_memory_{kind}_bytes", text, labels=("worker", "model", "device")
        )
        for offer, status in told:
            value: int | None = getattr(status, f"memory_{kind}_bytes")
            if value is not None:
                family.add_metric((status.worker_id, offer.model.name, offer.device), value)
        yield family


def _modes(told: Sequence[tuple[WorkerOffer, WorkerStatus]]) -> Iterator[Metric]:
    for name, field, text in (
        ("wan_worker_step_seconds", "step_s", "Median of the latest denoising steps of a worker."),
        (
            "wan_worker_saturated_ratio",
            "saturated_share",
            "Share of activations beyond the format's range, in a sampled step of the latest job.",
        ),
        (
            "wan_worker_flushed_ratio",
            "flushed_share",
            "Share of activations too small for the format though not zero, in the same step.",
        ),
    ):
        family = GaugeMetricFamily(name, text, labels=("worker", "model", "mode"))
        for offer, status in told:
            for mode, measured in status.modes.items():
                value = _number(measured, field)
                if value is not None:
                    family.add_metric((status.worker_id, offer.model.name, mode), value)
        yield family


def _number(measured: ModeStatus, field: str) -> float | None:
    value: float | None = getattr(measured, field)
    return value
