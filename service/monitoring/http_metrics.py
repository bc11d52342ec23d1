"""Count the HTTP requests of one service process and measure how long they take."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import Scope

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """Metrics labelled by route template, so that the number of series does not grow with paths."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "wan_http_requests",
            "Requests to this process by their answer's status; 499: the caller left first.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "wan_http_request_seconds",
            "Seconds from a request to the beginning of its answer, in this process.",
            ["method", "route"],
            buckets=BOUNDS_S,
            registry=registry,
        )

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one answered request; `seconds` is the time until its answer began."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "unmatched")
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
