"""Headers that every answer carries, so that no browser reads more into it than is meant."""

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NOTHING: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# What FastAPI's pages load: their scripts from a CDN, a script and styles of their own.
_DOCS: Final = (
    f"{_NOTHING}; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; worker-src blob:; connect-src 'self'; "
    "img-src data: https://fastapi.tiangolo.com https://cdn.redoc.ly"
)
_DOCS_PATHS: Final = ("/docs", "/docs/oauth2-redirect", "/redoc")


def security_headers(path: str, content_type: str) -> Mapping[str, str]:
    """Return the headers for an answer to `path`; a route's own of the same name come first."""
    headers = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",  # a signed link must not travel on
        "Content-Security-Policy": _DOCS if path in _DOCS_PATHS else _NOTHING,
    }
    if content_type.partition(";")[0].endswith("json"):
        headers["Cache-Control"] = "no-store"
    return headers


class SecurityHeaders:
    """ASGI middleware: puts the headers on every answer that passes through it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                content_type = headers.get("content-type", "")
                for name, value in security_headers(scope["path"], content_type).items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
