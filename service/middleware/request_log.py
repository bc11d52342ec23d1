"""The service's log: the lines of `jobs/logs.py`, with the ids of the request and its job.

A path is logged without its query, because a signed link in a log opens a video; bodies, which
hold the prompts, are not logged at all.
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

from jobs import logs
from jobs.ids import is_id
from jobs.logs import LogFormat
from service.monitoring.http_metrics import HttpMeasures

REQUEST_ID: Final = "X-Request-ID"

access_logger = logging.getLogger("service.access")

_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")

_NAMES = random.Random()
"""For names, not secrets: asking the system each time lets go of the interpreter's lock."""


@dataclass(slots=True)
class RequestFacts:
    """What the log says of a request, whichever thread handles it."""

    id: str
    scope: Scope
    created_job: str | None = None

    def job_id(self) -> str | None:
        """The job it made, or the one that its path names, as soon as the route is known."""
        if self.created_job is not None:
            return self.created_job
        named = self.scope.get("path_params", {})
        job_id = named.get("job_id") or named.get("video_id")
        return job_id if job_id is not None and is_id(job_id) else None


_CURRENT: ContextVar[RequestFacts | None] = ContextVar("request", default=None)


def begin_request(scope: Scope, given_id: str | None) -> RequestFacts:
    """Name the request at hand; a caller's own id is kept if it is harmless."""
    if given_id is None or not _SANE.fullmatch(given_id):
        given_id = f"{_NAMES.getrandbits(64):016x}"
    facts = RequestFacts(given_id, scope)
    # Never reset: every request has a task of its own, and the handler of unexpected errors, which
    # stands outside of all middleware, logs last.
    _CURRENT.set(facts)
    return facts


def note_created(job_id: str) -> None:
    """Let the lines of this request carry the job it has made."""
    facts = _CURRENT.get()
    if facts is not None:
        facts.created_job = job_id


def request_headers() -> dict[str, str]:
    """The header that tells a caller under which id the log has the request."""
    facts = _CURRENT.get()
    return {} if facts is None else {REQUEST_ID: facts.id}


def log_access(facts: RequestFacts, status: int, seconds: float) -> None:
    """Write the line of a request that has ended."""
    method, path = facts.scope["method"], quote(facts.scope["path"])
    client = (facts.scope.get("client") or ("-",))[0]
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


def configure_logging(log_format: LogFormat) -> None:
    """Set the log up; of httpx, which would show webhook addresses, only warnings are kept."""
    logs.configure(log_format, _ids, quiet=("httpx",))


def _ids() -> dict[str, str]:
    facts = _CURRENT.get()
    if facts is None:
        return {}
    job_id = facts.job_id()
    return {"request_id": facts.id} | ({} if job_id is None else {"job_id": job_id})


CALLER_LEFT: Final = 499
"""No status of HTTP's: the caller was gone before there was an answer, so it is logged only."""


class Observed:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, measures: HttpMeasures) -> None:
        self._app = app
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        facts = begin_request(scope, Headers(scope=scope).get(REQUEST_ID))
        status, answered_s = CALLER_LEFT, None

        async def send_named(message: Message) -> None:
            nonlocal status, answered_s
            if message["type"] == "http.response.start":
                status, answered_s = message["status"], time.perf_counter() - started
                MutableHeaders(scope=message)[REQUEST_ID] = facts.id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            # Answered outside of all middleware, if there was no answer yet.
            status = status if answered_s is not None else 500
            raise
        finally:
            seconds = time.perf_counter() - started
            self._measures.count(scope, status, seconds if answered_s is None else answered_s)
            log_access(facts, status, seconds)
