"""Log requests, and add the ids of the request and its job to every line of the log.

The lines have the format of `jobs/telemetry/logs.py`. A path is logged without its query, because
anybody who reads a signed link in the log could open the video. Bodies, which hold the prompts, are
not logged at all.
"""

import logging
import random
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.ids import is_id
from jobs.telemetry import logs, tracing
from jobs.telemetry.logs import LogFormat
from jobs.violations import shown
from service.middleware.log_throttle import throttle_noisy_loggers
from service.monitoring.http_metrics import HttpMetrics

REQUEST_ID: Final = "X-Request-ID"

access_logger = logging.getLogger("service.access")

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_RANDOM = random.Random()
"""Makes request ids, which are no secrets. Reading the system's randomness for each request would
release the interpreter's lock each time."""


@dataclass(slots=True)
class RequestFacts:
    """The facts about a request that every line of its log gets, in any thread that handles it."""

    id: str
    scope: Scope
    created_job: str | None = None

    def job_id(self) -> str | None:
        """Return the job that the request created, or the one in its path once routing is done."""
        if self.created_job is not None:
            return self.created_job
        named = self.scope.get("path_params", {})
        job_id = named.get("job_id") or named.get("video_id")
        return job_id if job_id is not None and is_id(job_id) else None


_CURRENT: ContextVar[RequestFacts | None] = ContextVar("request", default=None)


def begin_request(scope: Scope, given_id: str | None) -> RequestFacts:
    """Set the id of the current request; the caller's own id is used if it is valid."""
    if given_id is None or not _VALID_ID.fullmatch(given_id):
        given_id = f"{_RANDOM.getrandbits(64):016x}"
    facts = RequestFacts(given_id, scope)
    # Never reset: every request has its own task, and the handler of unexpected errors, which runs
    # outside of all middleware, logs last.
    _CURRENT.set(facts)
    return facts


def note_created(job_id: str) -> None:
    """Add the job that this request has created to the lines of its log."""
    facts = _CURRENT.get()
    if facts is not None:
        facts.created_job = job_id


def request_headers() -> dict[str, str]:
    """Return the header with the id under which the log has the request."""
    facts = _CURRENT.get()
    return {} if facts is None else {REQUEST_ID: facts.id}


def log_access(facts: RequestFacts, status: int, seconds: float) -> None:
    """Log a request that has ended."""
    method, path = shown(facts.scope["method"]), shown(quote(facts.scope["path"]))
    client = client_address(facts.scope)
    access_logger.info(
        "%s %s %d %.3f s, from %s",
        *(method, path, status, seconds, client),
        extra={
            "method": method,
            "path": path,
            "status": status,
            "duration_s": round(seconds, 6),
            "client": client,
        },
    )


def client_address(scope: Scope) -> str:
    """Return the client's address; behind a proxy it is whatever X-Forwarded-For says, cut."""
    return str(shown((scope.get("client") or ("-",))[0]))


def configure_logging(log_format: LogFormat) -> None:
    """Configure logging. Only warnings of httpx are kept, because its lines show webhook URLs."""
    logs.configure(log_format, _ids, quiet=("httpx",))
    throttle_noisy_loggers()


def _ids() -> dict[str, str]:
    facts = _CURRENT.get()
    if facts is None:
        return tracing.log_ids()
    job_id = facts.job_id()
    ids = {"request_id": facts.id} | ({} if job_id is None else {"job_id": job_id})
    return ids | tracing.log_ids()


CALLER_LEFT: Final = 499
"""Logged if the caller closed the connection before the answer; not a status of the HTTP standard,
and never sent."""


class RequestLog:
    """ASGI middleware around all others: logs and counts requests, and gives each an id."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        facts = begin_request(scope, Headers(scope=scope).get(REQUEST_ID))
        status, answered_s = CALLER_LEFT, None

        async def send_with_id(message: Message) -> None:
            nonlocal status, answered_s
            if message["type"] == "http.response.start":
                status, answered_s = message["status"], time.perf_counter() - started
                MutableHeaders(scope=message)[REQUEST_ID] = facts.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # If no answer has begun, one with 500 is sent outside of all middleware.
            status = status if answered_s is not None else 500
            raise
        finally:
            seconds = time.perf_counter() - started
            self._metrics.count(scope, status, seconds if answered_s is None else answered_s)
            log_access(facts, status, seconds)
