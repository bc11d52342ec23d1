"""Receive traces by OTLP over HTTP, as a collector does, and show them as trees."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from deploy.local.waiting import wait_until

ROOT_ID = ""


@dataclass(frozen=True)
class Seen:
    """A span that was received."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, Any]
    events: tuple[str, ...]
    links: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, service: str, span: Span) -> Seen:
        return cls(
            service=service,
            name=span.name,
            kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            begun_ns=span.start_time_unix_nano,
            ended_ns=span.end_time_unix_nano,
            failed=span.status.code == Status.STATUS_CODE_ERROR,
            attributes={each.key: _value(each.value) for each in span.attributes},
            events=tuple(event.name for event in span.events),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        )


@dataclass
class Collector:
    """What was received; `status` is what it answers, and `asked` how often it was asked."""

    url: str = ""
    status: int = 200
    asked: int = 0
    spans: list[Seen] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            found = {each.key: _value(each.value) for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [Seen.of(found["service.name"], span) for span in scope.spans]

    def wait_for(self, name: str, count: int = 1, limit_s: float = 10) -> list[Seen]:
        """Wait for so many spans whose names begin so."""
        wait_until(lambda: len(self.named(name)) >= count, limit_s, f"{count} of {name}", self.tree)
        return self.named(name)

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name.startswith(name)]

    def children(self, parent_id: str) -> list[Seen]:
        found = [span for span in self.spans if span.parent_id == parent_id]
        return sorted(found, key=lambda span: span.begun_ns)

    def tree(self, parent_id: str = ROOT_ID, indent: str = "") -> str:
        """Draw the spans below a parent, which need not have been received."""
        lines = ""
        for span in self.children(parent_id):
            took_s = (span.ended_ns - span.begun_ns) / 1e9
            error = f"  [{span.attributes.get('error.type')}]" if span.failed else ""
            lines += f"{indent}{span.name}  ({span.service}, {took_s:.2f} s){error}\n"
            lines += self.tree(span.span_id, indent + "    ")
        return lines


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """Listen until the end of the block."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            if found.status == 200:
                found.take(body)
            self.send_response(found.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            found.asked += 1

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
