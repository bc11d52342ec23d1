"""What is turned away before it reaches a route: requests that a web page sneaked in.

A page from anywhere can make its visitor's browser send requests to 127.0.0.1. It may pretend to
be this service under a name of its own (DNS rebinding; the Host check), or send a form here under
its own name (the Origin check). Keys are proof against both, an open service is not.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.errors import Forbidden
from service.middleware import problems
from service.settings import is_loopback

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class HostCheck:
    """ASGI middleware for a service on loopback: 421 unless Host is a name it is known by.

    Known are the names of loopback and `names`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = _host_name(Headers(scope=scope).get("host", ""))
            if not (host in self._names or is_loopback(host)):
                problem = problems.from_status(
                    421,
                    "This service listens on loopback and is not known by the name in the Host "
                    "header. Ask for localhost, or tell the service its name in "
                    "SERVICE_PUBLIC_URL.",
                    scope["path"],
                )
                await problems.response(scope["app"], problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OriginCheck:
    """ASGI middleware: 403 for what another site's page asks to be done.

    Programs send no Origin and pass; so do pages of the service itself, by the name in Host or by
    `public_url`.
    """

    def __init__(self, app: ASGIApp, public_url: str | None) -> None:
        self._app = app
        self._public = "" if public_url is None else urlsplit(public_url).netloc.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _READING:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._is_ours(origin, headers.get("host", "")):
                refused = Forbidden(
                    "The request comes from a page of another site (its Origin header), which may "
                    "not change anything here."
                )
                problem = problems.from_error(refused, scope["path"])
                await problems.response(scope["app"], problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, origin: str, host: str) -> bool:
        try:
            sender = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        # "null", which a sandboxed page sends, has no netloc.
        return bool(sender) and sender in (host.lower(), self._public)


def _host_name(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""
