"""Names, times and logs every request."""

import time
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import REQUEST_ID, begin_request, log_access
from service.metrics.http import HttpMeasures

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
