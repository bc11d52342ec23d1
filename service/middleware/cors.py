"""Let pages of other sites, those that the settings name, call the service with an API key (CORS).

Starlette's middleware makes the headers. Here it gets only requests of allowed origins, because it
would give some of its headers to others, too.
"""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS: Final = ("GET", "HEAD", "POST", "DELETE")
_SHOWN_HEADERS: Final = (
    *("Accept-Ranges", "Content-Range", "ETag", "Idempotent-Replayed", "Location", "RateLimit"),
    *("RateLimit-Policy", "Retry-After", "X-Request-ID", "openai-poll-after-ms"),
)
_PREFLIGHT_CACHED_S: Final = 600


class Cors:
    """ASGI middleware: lets pages of `origins` read answers, and answers their preflights.

    Browsers are not told to send cookies, so these pages need a key.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._allowed = CORSMiddleware(
            app,
            allow_origins=self._origins,
            allow_methods=_METHODS,
            # Any: clients add headers of their own, such as OpenAI's x-stainless-..., and a page
            # that knows no key gains nothing by them.
            allow_headers=("*",),
            expose_headers=_SHOWN_HEADERS,
            max_age=_PREFLIGHT_CACHED_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if Headers(scope=scope).get("origin") in self._origins:
            await self._allowed(scope, receive, send)
            return

        async def send_varied(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A cache must not give this answer to an allowed page, which could not read it.
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_varied)
