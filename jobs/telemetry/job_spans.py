"""Make the spans of a job: sending it to its queue, each attempt at it, and each webhook call.

Names and attributes follow OpenTelemetry's conventions for messaging: the job is a message that a
PRODUCER span sends and a CONSUMER span processes. The record holds the context of the PRODUCER
span, and every attempt is a child of it, so that a job which is tried again is one trace.

The process that ends an attempt in the record sends the attempt's span. That need not be the one
that began it, which may be dead. So the ids of an attempt's span follow from the job's id and the
number of the attempt: the stages that a lost worker has sent find their parent, and an attempt
links to the one before it. A job whose record has no context, as one of an older service, gets the
id of its trace from its own id.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from jobs.telemetry import tracing
from jobs.telemetry.tracing import Attributes, Chosen, Kind, Span, TraceContext

SYSTEM: Final = "rq"


def sending(queue: str, jobs: int) -> AbstractContextManager[Span]:
    """Make the block, which queues so many jobs, a span."""
    attributes: dict[str, str | int | float | bool] = _messaging(queue, "send")
    if jobs > 1:
        attributes["messaging.batch.message_count"] = jobs
    return tracing.span(f"send {queue}", attributes, kind=Kind.PRODUCER)


@dataclass(frozen=True, slots=True)
class TracedAttempt:
    """What the span of an attempt is made of.

    Attributes:
        context: the one in the job's record; None if there is none.
        shape: model, mode, size, frames, guided, as in the metrics.
    """

    job_id: str
    number: int
    queue: str
    worker: str
    shape: str
    context: TraceContext | None

    def begin(self, begun_ns: int | None = None) -> Span:
        """Begin the span of this attempt."""
        before = None if self.number <= 1 else self._link_to(self.number - 1)
        return tracing.begin(
            f"process {self.queue}",
            {
                **_messaging(self.queue, "process"),
                "messaging.message.id": self.job_id,
                "wan.attempt": self.number,
                "wan.shape": self.shape,
                "wan.worker": self.worker,
            },
            kind=Kind.CONSUMER,
            parent=self.context or _NO_PARENT,
            link=before,
            chosen=Chosen(_number(self.job_id, 16), self._span_id(self.number), begun_ns),
        )

    def _span_id(self, number: int) -> int:
        return _number(f"{self.job_id}/{number}", 8)

    def _link_to(self, number: int) -> TraceContext:
        trace_id = f"{_number(self.job_id, 16):032x}"
        if self.context is not None:
            trace_id = self.context.traceparent.split("-")[1]
        return TraceContext(f"00-{trace_id}-{self._span_id(number):016x}-01")


_NO_PARENT: Final = TraceContext("")
"""A context without a span, so that the current one is no parent either."""


@contextmanager
def attempt(traced: TracedAttempt) -> Iterator[Span]:
    """Make the block the span of an attempt.

    An exception leaves the span unsent: the attempt was not ended by this process, and whoever ends
    it sends the span.
    """
    if not tracing.is_on():
        yield tracing.OFF
        return
    span = traced.begin()
    with span.current():
        yield span
    span.end()


def lost(traced: TracedAttempt, begun_ns: int, details: Attributes) -> None:
    """Send the span of an attempt that was lost with its worker; it ends now."""
    if not tracing.is_on():
        return
    # Clocks differ, and no span ends before it begins.
    span = traced.begin(min(begun_ns, time.time_ns()))
    span.set({"wan.outcome": "lost", **details})
    span.fail("worker_lost")
    span.end()


def webhook_call(
    job_id: str, context: TraceContext | None, host: str, tries_before: int
) -> AbstractContextManager[Span]:
    """Make the block, which calls a webhook once, a span; of its URL it tells the host only."""
    attributes: dict[str, str | int | float | bool] = {
        "http.request.method": "POST",
        "http.request.resend_count": tries_before,
        "server.address": host,
        "wan.job": job_id,
    }
    return tracing.span("POST webhook", attributes, kind=Kind.CLIENT, parent=context or _NO_PARENT)


def _messaging(queue: str, operation: str) -> dict[str, str | int | float | bool]:
    return {
        "messaging.system": SYSTEM,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
    }


def _number(text: str, size: int) -> int:
    """Make a number of so many bytes from a text, never 0, which is no valid id."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big") or 1
