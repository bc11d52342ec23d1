"""Turn the counters and durations of jobs in Redis into Prometheus metrics.

See `jobs/store/counters.py` and `jobs/durations.py`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from jobs.durations import parse
from jobs.store.counters import BOUNDS_S, COUNTERS, HISTOGRAMS, LABELS

_COUNTERS: Final = {
    "created": ("wan_jobs_created", "Jobs that were accepted."),
    "ended": ("wan_jobs_ended", "Jobs that ended; `code` says why one failed."),
    "claimed": ("wan_attempts_started", "Attempts that workers began."),
    "lost": ("wan_attempts_lost", "Attempts that vanished: their worker crashed, hung or was cut."),
    "released": ("wan_attempts_released", "Attempts that a worker gave back when it was drained."),
    "returned": ("wan_attempts_returned", "Attempts that a worker at fault gave back."),
}
_HISTOGRAMS: Final = {
    "wait": ("wan_job_wait_seconds", "From a job's creation to its first attempt."),
    "service": (
        "wan_job_service_seconds",
        "From the start of the attempt that succeeded to the job's end.",
    ),
}
_BOUNDS: Final = (*(str(bound) for bound in BOUNDS_S), "+Inf")

Values = Mapping[tuple[str, ...], float]
"""The counters of one name by their labels."""


def families(counters: Mapping[bytes, bytes], durations: Mapping[bytes, bytes]) -> Iterator[Metric]:
    """Build metrics from the two Redis hashes; fields that another version wrote are skipped."""
    by_name = _by_name(counters)
    for name, (metric, text) in _COUNTERS.items():
        family = CounterMetricFamily(metric, text, labels=(*LABELS, *COUNTERS[name]))
        for labels, value in by_name[name].items():
            if len(labels) == len(LABELS) + len(COUNTERS[name]):
                family.add_metric(labels, value)
        yield family
    yield _webhooks(by_name["webhook"])
    for name in HISTOGRAMS:
        yield _histogram(*_HISTOGRAMS[name], by_name[name])
    yield from _durations(durations)


def _by_name(counters: Mapping[bytes, bytes]) -> Mapping[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for field, value in counters.items():
        try:
            name, *labels = field.decode().split("|")
            found[name][tuple(labels)] = float(value)
        except ValueError:
            continue
    return found


def _webhooks(values: Values) -> Metric:
    """Sum the calls over the shapes of jobs, which do not affect whether a webhook arrives."""
    outcomes: dict[str, float] = defaultdict(float)
    for labels, value in values.items():
        outcomes[labels[-1]] += value
    family = CounterMetricFamily(
        "wan_webhook_calls", "Calls of webhooks by their outcome.", labels=COUNTERS["webhook"]
    )
    for outcome, value in outcomes.items():
        family.add_metric((outcome,), value)
    return family


def _histogram(metric: str, text: str, values: Values) -> Metric:
    family = HistogramMetricFamily(metric, text, labels=LABELS)
    for shape in sorted({labels[: len(LABELS)] for labels in values if len(labels) > len(LABELS)}):
        # Redis holds a count for each bucket alone; Prometheus' buckets are cumulative.
        below = accumulate(values.get((*shape, bound), 0.0) for bound in _BOUNDS)
        buckets = [
            (bound if bound == "+Inf" else str(float(bound)), n)
            for bound, n in zip(_BOUNDS, below, strict=True)
        ]
        family.add_metric(shape, buckets, values.get((*shape, "sum"), 0.0))
    return family


def _durations(durations: Mapping[bytes, bytes]) -> Sequence[Metric]:
    step = GaugeMetricFamily(
        "wan_step_seconds", "One denoising step, as last measured, smoothed.", labels=LABELS
    )
    rest = GaugeMetricFamily(
        "wan_job_rest_seconds", "A job without its denoising steps, smoothed.", labels=LABELS
    )
    for shape, text in durations.items():
        labels = shape.decode().split("|")
        if len(labels) != len(LABELS):
            continue
        try:
            measured = parse(text)
        except ValueError:
            continue
        step.add_metric(labels, measured.step_s)
        rest.add_metric(labels, measured.rest_s + measured.text_encoding_s)
    return step, rest
