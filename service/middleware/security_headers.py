"""Add the headers that keep browsers from misusing an answer: sniffing, framing, scripts."""

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DEFAULT_POLICY: Final = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A page loads what comes with the service, and nothing else. Its files hold the scripts and styles,
# the page itself none.
_PAGE_POLICY: Final = (
    f"{_DEFAULT_POLICY}; script-src 'self'; style-src 'self'; img-src 'self' data:{{bucket}}; "
    "media-src 'self'{bucket}; font-src 'self'; connect-src 'self'{bucket}"
)


def security_headers(content_type: str, bucket: str | None = None) -> Mapping[str, str]:
    """Return the headers for an answer of this type; those that a route sets take precedence.

    Args:
        bucket: the origin to which the pages' requests for videos and pictures are redirected.
    """
    media_type = content_type.partition(";")[0]
    page_policy = _PAGE_POLICY.format(bucket="" if bucket is None else f" {bucket}")
    headers = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",  # signed links must not be sent to other sites
        "Content-Security-Policy": page_policy if media_type == "text/html" else _DEFAULT_POLICY,
    }
    if media_type.endswith("json"):
        headers["Cache-Control"] = "no-store"
    return headers


class SecurityHeaders:
    """ASGI middleware: adds the headers to every answer that passes through it."""

    def __init__(self, app: ASGIApp, bucket: str | None = None) -> None:
        self._app = app
        self._bucket = bucket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                content_type = headers.get("content-type", "")
                for name, value in security_headers(content_type, self._bucket).items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
