"""Turn the state of queues, jobs and workers into Prometheus metrics."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from jobs.store.workers import WorkerStatus
from service.monitoring.fleet import Fleet, QueueState, WorkerState

STATES: Final = ("idle", "busy", "draining", "drained", "degraded", "unknown")
"""States of workers. `draining`: it ends its last job. `drained`: it takes none until an operator
says so. `degraded`: it takes none until it has proven that it can end one. `unknown`: it publishes
no status."""

_MEMORY: Final = {
    "memory_allocated_bytes": "Device memory in use.",
    "memory_peak_bytes": "The most device memory that was in use at once.",
    "memory_total_bytes": "The device's memory.",
}
_MEASURED: Final = {
    "wan_worker_step_seconds": ("step_s", "Median of a worker's latest denoising steps."),
    "wan_worker_saturated_ratio": (
        "saturated_share",
        "Share of activations beyond the format's range, in a sampled step of the latest job.",
    ),
    "wan_worker_flushed_ratio": (
        "flushed_share",
        "Share of activations too small for the format though not zero, in the same step.",
    ),
}

WorkerStates = Sequence[tuple[WorkerState, WorkerStatus]]
"""The workers that publish a status, each with its status."""


def families(fleet: Fleet) -> Iterator[Metric]:
    """Build the metrics of one state."""
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


def _worker_families(workers: Sequence[WorkerState]) -> Iterator[Metric]:
    states = GaugeMetricFamily("wan_workers", "Workers by their state.", labels=("model", "state"))
    numbers = Counter((worker.model, worker.state) for worker in workers)
    for model in sorted({worker.model for worker in workers}):
        for state in STATES:
            states.add_metric((model, state), numbers[model, state])
    yield states
    reporting = [(worker, worker.status) for worker in workers if worker.status is not None]
    done = CounterMetricFamily(
        "wan_worker_jobs_done",
        "Jobs that a worker ended with a video since its start.",
        labels=("worker", "model"),
    )
    for worker, status in reporting:
        done.add_metric((worker.id, worker.model), status.jobs_done)
    yield done
    yield _degraded(workers)
    yield from _memory(reporting)
    yield from _measured(reporting)


def _degraded(workers: Sequence[WorkerState]) -> Metric:
    family = GaugeMetricFamily(
        "wan_worker_degraded",
        "1 where a worker runs a mode slower than it was made for; its log says why.",
        labels=("worker", "model", "mode"),
    )
    for worker in workers:
        for mode in () if worker.offer is None else worker.offer.modes:
            family.add_metric((worker.id, worker.model, mode.name), mode.warning is not None)
    return family


def _memory(reporting: WorkerStates) -> Iterator[Metric]:
    for name, text in _MEMORY.items():
        family = GaugeMetricFamily(f"wan_worker_{name}", text, labels=("worker", "model", "device"))
        for worker, status in reporting:
            value: int | None = getattr(status, name)
            if value is not None:
                family.add_metric((worker.id, worker.model, worker.device), value)
        yield family


def _measured(reporting: WorkerStates) -> Iterator[Metric]:
    for name, (field, text) in _MEASURED.items():
        family = GaugeMetricFamily(name, text, labels=("worker", "model", "mode"))
        for worker, status in reporting:
            for mode, measured in status.modes.items():
                value: float | None = getattr(measured, field)
                if value is not None:
                    family.add_metric((worker.id, worker.model, mode), value)
        yield family
