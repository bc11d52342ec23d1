"""Trace a process with OpenTelemetry: make spans, and pass their context on as text.

Nothing is traced until `start`, which a program's `main()` calls once, as it configures logging.
Until then every function here returns at once, and nothing of OpenTelemetry is imported. A span is
sent when it ends, by a thread of its own: no caller waits for a collector, and spans that cannot be
sent are dropped.

No span holds a prompt, a key, or the text of an error, which may quote one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from jobs.telemetry.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from jobs.telemetry.pipeline import Pipeline

Attributes = Mapping[str, str | int | float | bool]

NO_ATTRIBUTES: Final[Attributes] = {}

LONGEST_STATE: Final = 512
"""Characters of a caller's `tracestate` that are kept and passed on, the number that W3C asks for:
every job's record holds them for as long as it is kept.
"""

LONG_ENTRY: Final = 128
"""Entries of `tracestate` that are longer go first."""


class Kind(Enum):
    """The kinds of spans, by OpenTelemetry's names."""

    INTERNAL = "INTERNAL"
    CLIENT = "CLIENT"
    PRODUCER = "PRODUCER"
    CONSUMER = "CONSUMER"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span as W3C Trace Context writes it, in the headers of the same names."""

    traceparent: str
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is chosen for a span, so that another process can do the same.

    Attributes:
        trace_id: used only if the span has no parent.
        begun_ns: when it began, in ns since 1970; None for now.
    """

    trace_id: int
    span_id: int
    begun_ns: int | None = None


class Span:
    """A span of this process; one of a process that does not trace does nothing."""

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span | None = None) -> None:
        self._span = span

    def set(self, attributes: Attributes) -> None:
        """Add attributes, or replace those of the same names."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Add an event at this moment."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def fail(self, reason: str) -> None:
        """Mark the span as failed, for a reason that is a code or a class, and never a message."""
        if self._span is None:
            return
        from opentelemetry.trace import StatusCode  # noqa: PLC0415  # only if there are traces

        self._span.set_attribute("error.type", reason)
        self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """End and send the span; nothing happens if it has ended."""
        if self._span is not None and self._span.is_recording():
            self._span.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the span the parent of those that begin in the block, and the one in log lines."""
        if self._span is None:
            yield
            return
        from opentelemetry.trace import use_span  # noqa: PLC0415

        with use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield


OFF: Final = Span()


class _Process:
    """What `start` has set up for this process."""

    pipeline: Pipeline | None = None


def start(settings: TracingSettings, service: str) -> None:
    """Trace this process if the settings say so.

    Args:
        service: the name of the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say
            otherwise.
    """
    if not settings.traces:
        return
    # Costs a tenth of a second and some MB, so only who wants traces pays.
    from jobs.telemetry.pipeline import Pipeline  # noqa: PLC0415

    _Process.pipeline = Pipeline(settings.traces_url, settings.otel_service_name or service)


def stop() -> None:
    """Send what is left, for some seconds at most, and trace no more. May be called again."""
    pipeline, _Process.pipeline = _Process.pipeline, None
    if pipeline is not None:
        pipeline.close()


def is_on() -> bool:
    """Return whether this process traces."""
    return _Process.pipeline is not None


def provider() -> trace.TracerProvider | None:
    """Return the provider for libraries that make spans themselves; None if nothing is traced."""
    return None if _Process.pipeline is None else _Process.pipeline.provider


def begin(
    name: str,
    attributes: Attributes = NO_ATTRIBUTES,
    *,
    kind: Kind = Kind.INTERNAL,
    parent: TraceContext | None = None,
    link: TraceContext | None = None,
    chosen: Chosen | None = None,
) -> Span:
    """Begin a span, which somebody must `end`; it does not become the current one.

    Args:
        parent: the parent, in this process or another; by default the current span.
        link: another span that has to do with this one.
        chosen: its ids and its begin; by default random ones, and now.
    """
    pipeline = _Process.pipeline
    if pipeline is None:
        return OFF
    from opentelemetry import trace  # noqa: PLC0415

    links = (
        [] if link is None else [trace.Link(trace.get_current_span(_read(link)).get_span_context())]
    )
    with pipeline.chosen_ids(chosen):
        return Span(
            pipeline.tracer.start_span(
                name,
                context=None if parent is None else _read(parent),
                kind=trace.SpanKind[kind.value],
                attributes=attributes,
                links=links,
                start_time=None if chosen is None else chosen.begun_ns,
            )
        )


def span(
    name: str,
    attributes: Attributes = NO_ATTRIBUTES,
    *,
    kind: Kind = Kind.INTERNAL,
    parent: TraceContext | None = None,
    stops: tuple[type[Exception], ...] = (),
) -> AbstractContextManager[Span]:
    """Make the block a span, and the current one meanwhile.

    Args:
        parent: as in `begin`.
        stops: exceptions that end the block and are no failures.
    """
    if _Process.pipeline is None:
        return nullcontext(OFF)
    return _running(begin(name, attributes, kind=kind, parent=parent), stops)


@contextmanager
def _running(made: Span, stops: tuple[type[Exception], ...]) -> Iterator[Span]:
    try:
        with made.current():
            yield made
    except Exception as error:
        if not isinstance(error, stops):
            made.fail(type(error).__name__)
        raise
    finally:
        made.end()


def current_span() -> Span:
    """Return the current span of this thread or task."""
    if _Process.pipeline is None:
        return OFF
    from opentelemetry.trace import get_current_span  # noqa: PLC0415

    return Span(get_current_span())


def current_fields() -> dict[str, str]:
    """Return the current span as `traceparent` and, if it has one, `tracestate`, to pass them on.

    Empty if there is no current span. `tracestate` has at most LONGEST_STATE characters.
    """
    fields: dict[str, str] = {}
    if _Process.pipeline is not None:
        _propagator().inject(fields)
    if state := _bounded(fields.pop("tracestate", "")):
        fields["tracestate"] = state
    return fields


def _bounded(state: str) -> str:
    """Drop entries until the rest is short enough: long ones first, then the last, as W3C asks."""
    entries = state.split(",")
    while len(",".join(entries)) > LONGEST_STATE:
        long = [entry for entry in entries if len(entry) > LONG_ENTRY]
        entries.remove((long or entries)[-1])
    return ",".join(entries)


def log_ids() -> dict[str, str]:
    """Return the id of the current trace for a line of the log."""
    if _Process.pipeline is None:
        return {}
    from opentelemetry import trace  # noqa: PLC0415

    found = trace.get_current_span().get_span_context()
    return {"trace_id": trace.format_trace_id(found.trace_id)} if found.is_valid else {}


def _read(written: TraceContext) -> Context:
    """Read a context; what is no valid one becomes one without a span."""
    from opentelemetry.context import Context  # noqa: PLC0415

    carrier = {"traceparent": written.traceparent, "tracestate": written.tracestate}
    return _propagator().extract(carrier, context=Context())


def _propagator() -> TraceContextTextMapPropagator:
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    return TraceContextTextMapPropagator()
