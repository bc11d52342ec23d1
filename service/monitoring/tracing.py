"""Choose which requests FastAPI makes spans of; the spans themselves are FastAPI's."""

from collections.abc import MutableMapping
from typing import Any, Final

from fastapi.telemetry import TelemetryConfig
from starlette.datastructures import Headers

from jobs.telemetry import tracing

_CHANGING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def telemetry() -> TelemetryConfig:
    """Return FastAPI's settings: spans if this process traces, and nothing else.

    Metrics are in `/metrics`, and errors in the log. FastAPI's log records would hold the text of
    errors, which may quote a prompt.
    """
    provider = tracing.provider()
    return {
        "tracer_provider": provider,
        "tracing": provider is not None,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
        "exclude": is_left_out,
    }


def is_left_out(scope: MutableMapping[str, Any]) -> bool:
    """Return whether a request is not traced: one that reads, unless its caller traces it.

    Pages and clients poll every few seconds, and probes and Prometheus for ever.
    """
    return scope.get("method") not in _CHANGING and "traceparent" not in Headers(scope=scope)
