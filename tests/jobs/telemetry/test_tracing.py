"""Test what a process that traces sends, and that one which does not pays nothing."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.errors import GenerationCancelled, StaleAttempt
from jobs.store.job_store import JobStore
from jobs.telemetry import job_spans, tracing
from jobs.telemetry.job_spans import TracedAttempt
from jobs.telemetry.settings import TracingSettings
from jobs.telemetry.tracing import TraceContext
from service.settings import ServiceSettings
from tests.jobs.telemetry.otlp_receiver import Collector, collector
from tests.support.requests import generation_request
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[3]


def settings(url: str) -> TracingSettings:
    return TracingSettings(otel_endpoint=url)


@pytest.fixture(autouse=True)
def quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def spans() -> Iterator[Collector]:
    """This process traces, to this collector."""
    with collector() as found:
        tracing.start(settings(found.url), "tests")
        yield found
        tracing.stop()


def was_asked(found: Collector, times: int) -> bool:
    return found.asked >= times


def traced(number: int, context: TraceContext | None = None) -> TracedAttempt:
    return TracedAttempt("job-1", number, "queue", "worker", "shape", context)


@pytest.mark.parametrize(
    "imports",
    [
        "service.app, service.__main__",
        "worker.consumer.serve, worker.tasks",
    ],
)
def test_a_process_that_does_not_trace_imports_nothing(imports: str) -> None:
    """FastAPI imports OpenTelemetry's API all the same, and redis-py the SDK's metrics."""
    forbidden = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "jobs.telemetry.pipeline")
    code = (
        f"import sys, {imports}; from jobs.telemetry import tracing, settings\n"
        f"tracing.start(settings.TracingSettings(), 'x')\n"
        f"with tracing.span('x') as span: span.event('y'); assert not tracing.log_ids()\n"
        f"print([name for name in sys.modules if name.startswith({forbidden!r})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_EXPORTER": ""}, False),
    ],
)
def test_the_environment_turns_traces_on(
    environment: dict[str, str], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert TracingSettings().traces is on


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1/x/"}, "http://c:1/x/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1/x"}, "http://c:1/x"),
    ],
)
def test_the_endpoint_is_that_of_the_specification(
    environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert TracingSettings().traces_url == url


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "take otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "take http/protobuf"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "not a web address"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@:1", "not a web address"),
    ],
)
def test_what_is_not_supported_is_refused_at_the_start(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=says) as refused:
        TracingSettings()
    assert "secret" not in str(refused.value.errors(include_input=False))


@pytest.mark.parametrize("kind", [ServiceSettings, WorkerSettings])
def test_a_missing_library_is_named_at_the_start(
    kind: type[TracingSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace", raising=False)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///videos")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    with pytest.raises(ValidationError, match="install the extra `tracing`") as refused:
        kind()
    (error,) = refused.value.errors()
    assert "opentelemetry.sdk.trace is not installed" in error["msg"]
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not kind().traces


def test_a_span_has_its_parent_and_says_how_it_ended(spans: Collector) -> None:
    with tracing.span("outer"), tracing.span("inner", {"a": 1}) as inner:
        inner.event("half")
        assert list(tracing.log_ids()) == ["trace_id"]
    with pytest.raises(ValueError, match="a prompt"), tracing.span("failed"):
        raise ValueError("a prompt")
    with (
        pytest.raises(GenerationCancelled),
        tracing.span("stopped", stops=(GenerationCancelled,)),
    ):
        raise GenerationCancelled("stop")
    assert tracing.log_ids() == {}
    tracing.stop()

    (outer,), (seen,) = spans.named("outer"), spans.named("inner")
    assert (seen.parent_id, seen.trace_id) == (outer.span_id, outer.trace_id)
    assert (seen.attributes, seen.events, seen.service) == ({"a": 1}, ("half",), "tests")
    (failed,), (stopped,) = spans.named("failed"), spans.named("stopped")
    assert failed.failed
    assert failed.attributes == {"error.type": "ValueError"}
    assert not stopped.failed
    assert not any(b"a prompt" in body for body in spans.bodies)


def test_the_environment_names_the_service(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment=blue")
    with collector() as found:
        tracing.start(settings(found.url), "tests")
        with tracing.span("x"):
            pass
        tracing.stop()
        assert [span.service for span in found.spans] == ["mine"]


def test_a_record_keeps_the_context_of_its_creation(
    spans: Collector, store: JobStore, redis: Redis
) -> None:
    caller = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "congo=t61")
    with tracing.span("request", parent=caller):
        job = store.create(generation_request(), "queue").job
    tracing.stop()
    (sent,) = spans.named("send queue")
    assert job.traceparent == f"00-0af7651916cd43dd8448eb211c80319c-{sent.span_id}-01"
    assert store.get(job.id).trace == TraceContext(job.traceparent, "congo=t61")
    # Without traces there is nothing to keep, and a record of before reads as before.
    plain = store.create(generation_request(), "queue").job
    assert store.get(plain.id).trace is None
    assert b"traceparent" not in redis.hgetall(redis_keys.record(plain.id))


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        (["a=1", "b=2"], ["a=1", "b=2"]),
        # W3C: long entries go first, then the last ones; none is cut.
        (["a=" + "x" * 200, *(f"k{n}=" + "x" * 96 for n in range(5))], [1, 2, 3, 4, 5]),
        ([f"k{n}=" + "x" * 100 for n in range(8)], [0, 1, 2, 3]),
        (["a=" + "x" * 256, "b=" + "x" * 256], [0]),
    ],
    ids=["short", "one long", "many", "long only"],
)
def test_a_state_of_the_caller_is_kept_up_to_512_characters(
    spans: Collector, entries: list[str], kept: list[str | int]
) -> None:
    sampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.span("request", parent=TraceContext(sampled, ",".join(entries))):
        state = tracing.current_fields()["tracestate"]
    assert len(state) <= 512
    wanted = [entries[each] if isinstance(each, int) else each for each in kept]
    assert state.split(",") == wanted


@pytest.mark.parametrize(
    "context",
    [None, TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")],
    ids=["a job of an older service", "a job with a trace"],
)
def test_the_attempts_of_a_job_are_in_one_trace(
    spans: Collector, context: TraceContext | None
) -> None:
    with (
        pytest.raises(StaleAttempt),
        job_spans.attempt(traced(1, context)),
        tracing.span("denoise"),
    ):
        raise StaleAttempt("another process ended this attempt")
    assert not spans.named("process")
    job_spans.lost(traced(1, context), time.time_ns() - 10**9, {"wan.last_step": 3})
    with job_spans.attempt(traced(2, context)):
        pass
    tracing.stop()
    (stage,) = spans.named("denoise")
    first, second = spans.named("process")
    assert {each.trace_id for each in (stage, first, second)} == {first.trace_id}
    assert stage.parent_id == first.span_id != second.span_id
    assert second.links == ((first.trace_id, first.span_id),)
    assert first.parent_id == second.parent_id == (context.traceparent[36:52] if context else "")


def test_a_trace_that_its_caller_does_not_sample_is_not_sent(spans: Collector) -> None:
    unsampled = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    with tracing.span("request", parent=unsampled), job_spans.attempt(traced(1, unsampled)):
        pass
    job_spans.lost(traced(2, unsampled), time.time_ns(), {})
    with tracing.span("another"):
        pass
    tracing.stop()
    assert [span.name for span in spans.spans] == ["another"]


def test_a_query_is_not_sent(spans: Collector) -> None:
    with tracing.span("GET", {"url.query": "signature=0b9c1f6c"}):
        pass
    tracing.stop()
    assert spans.spans[0].attributes == {"url.query": "REDACTED"}


def test_a_collector_that_takes_nothing_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = lambda: [each.getMessage() for each in caplog.records]  # noqa: E731
    with collector() as found:
        found.status = 400
        tracing.start(settings(found.url), "tests")
        for number in range(3):
            with tracing.span("lost"):
                pass
            wait_until(partial(was_asked, found, number + 1))
        found.status = 200
        with tracing.span("kept"):
            pass
        found.wait_for("kept")
        tracing.stop()
    refused, again = lines()
    assert refused.startswith("Traces cannot be sent, and are dropped until they can: ")
    assert "400" in refused
    assert again == "traces are sent again; 3 spans were dropped"
    assert not found.named("lost")


def test_a_collector_that_is_away_is_named_by_its_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    tracing.start(settings(f"http://127.0.0.1:{unused_port}"), "tests")
    with tracing.span("lost"):
        pass
    wait_until(lambda: bool(caplog.records), 20)
    (line,) = (each.getMessage() for each in caplog.records)
    assert "Connection refused" in line
    assert "retrying" not in line
    tracing.stop()


def test_the_end_does_not_wait_for_a_collector_that_is_away(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    tracing.start(settings(f"http://127.0.0.1:{unused_port}"), "tests")
    with tracing.span("lost"):
        pass
    started = time.monotonic()
    tracing.stop()
    assert time.monotonic() - started < 15  # the library alone may take half a minute
