"""Add the headers that keep browsers from misusing an answer: sniffing, framing, scripts."""

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DEFAULT_POLICY: Final = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# FastAPI's pages load scripts and styles from a CDN, and contain some of their own.
_DOCS_POLICY: Final = (
    f"{_DEFAULT_POLICY}; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; worker-src blob:; connect-src 'self'; "
    "img-src data: https://fastapi.tiangolo.com https://cdn.redoc.ly"
)
_DOCS_PATHS: Final = ("/docs", "/docs/oauth2-redirect", "/redoc")


def security_headers(path: str, content_type: str) -> Mapping[str, str]:
    """Return the headers for an answer to `path`; those that a route sets take precedence."""
    headers = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",  # signed links must not be sent to other sites
        "Content-Security-Policy": _DOCS_POLICY if path in _DOCS_PATHS else _DEFAULT_POLICY,
    }
    if content_type.partition(";")[0].endswith("json"):
        headers["Cache-Control"] = "no-store"
    return headers


class SecurityHeaders:
    """ASGI middleware: adds the headers to every answer that passes through it."""

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
