"""Set up OpenTelemetry's SDK: resource, ids, and a thread that sends spans by OTLP over HTTP.

Imported only by a process that traces, as it loads the SDK.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from jobs.telemetry.tracing import Chosen

logger = logging.getLogger(__name__)

CLOSE_S: Final = 5.0
CLOSE_WHILE_LOST_S: Final = 0.5
"""How long the end of a process waits until its last spans are sent; less if the ones before were
not."""

LONGEST_ATTRIBUTE: Final = 1024
"""Characters of an attribute: callers choose paths, and thousands of spans may wait to be sent."""

LONGEST_REASON: Final = 300

_QUERY: Final = "url.query"

_WHY: Final = re.compile(r"Transient error (.*) encountered while exporting", re.DOTALL)
"""What a message of the library says about the cause, without what it does about it."""

_CHOSEN: ContextVar[Chosen | None] = ContextVar("chosen_ids", default=None)


class Pipeline:
    """The way of this process' spans to a collector, until `close`."""

    def __init__(self, url: str, service: str) -> None:
        self._exporter = _Exporter(OTLPSpanExporter(endpoint=url))
        self.provider = TracerProvider(
            resource=_resource(service),
            id_generator=_ChosenIds(),
            span_limits=SpanLimits(max_attribute_length=LONGEST_ATTRIBUTE),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(_WithoutQuery())
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("wan-hif8", version("wan-hif8"))

    @contextmanager
    def chosen_ids(self, chosen: Chosen | None) -> Iterator[None]:
        """Give the span that begins in the block these ids; None for random ones."""
        token = _CHOSEN.set(chosen)
        try:
            yield
        finally:
            _CHOSEN.reset(token)

    def close(self) -> None:
        """Send what is left, and end; a collector that does not answer is not waited for."""
        # In a thread: the library may wait for half a minute, and lets nobody choose.
        thread = threading.Thread(target=self.provider.shutdown, name="last-spans", daemon=True)
        thread.start()
        thread.join(CLOSE_WHILE_LOST_S if self._exporter.is_failing else CLOSE_S)


def _resource(service: str) -> Resource:
    defaults = {
        "service.name": service,
        "service.version": version("wan-hif8"),
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    # What the environment says goes before; `create` would let the arguments win.
    return Resource.create({**defaults, **OTELResourceDetector().detect().attributes})


class _ChosenIds(RandomIdGenerator):
    """Draws ids, except for spans whose ids are chosen."""

    def generate_span_id(self) -> int:
        chosen = _CHOSEN.get()
        return super().generate_span_id() if chosen is None else chosen.span_id

    def generate_trace_id(self) -> int:
        chosen = _CHOSEN.get()
        return super().generate_trace_id() if chosen is None else chosen.trace_id


class _WithoutQuery(SpanProcessor):
    """Replaces the query of every request: a signature in it would open a video to whoever reads
    the trace. An attribute can be replaced only.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if _QUERY in (span.attributes or {}):
            span.set_attribute(_QUERY, "REDACTED")


class _Exporter(SpanExporter):
    """Says in the log once that spans cannot be sent, and once that they can again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0
        self._notices = _FirstNotice()
        library = logging.getLogger("opentelemetry.exporter")
        library.handlers[:] = [self._notices]
        library.propagate = False

    @property
    def is_failing(self) -> bool:
        """Whether the latest batch could not be sent."""
        return self._lost > 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                logger.warning(
                    "Traces cannot be sent, and are dropped until they can: %s. Check the "
                    "collector and OTEL_EXPORTER_OTLP_ENDPOINT, or set OTEL_SDK_DISABLED=true.",
                    self._notices.first[:LONGEST_REASON].rstrip("."),
                )
            self._lost += len(spans)
        elif self._lost:
            logger.info("traces are sent again; %d spans were dropped", self._lost)
            self._lost = 0
        self._notices.first = ""
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _FirstNotice(logging.Handler):
    """Keeps what the library first says about a batch that it cannot send.

    It would say something for every try of every batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.first:
            said = record.getMessage()
            found = _WHY.match(said)
            self.first = said if found is None else found[1]
