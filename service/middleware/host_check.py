"""Refuse requests that a web page of another site makes its visitor's browser send.

Any page can make a browser send requests to 127.0.0.1. The page's own host name may resolve to this
service (DNS rebinding; prevented by the Host check), or the page may submit a form to it (prevented
by the Origin check). A service that requires keys is safe from both, an open one is not.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.errors import Forbidden
from service.middleware import problems
from service.settings import is_loopback

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class HostCheck:
    """ASGI middleware for a service on loopback: answers 421 to an unknown name in Host.

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
    """ASGI middleware: answers 403 to a request from another site's page, unless it only reads.

    Requests without Origin pass, because only browsers send it. So do those of the service's own
    pages, whose origin is the name in Host or that of `public_url`.
    """

    def __init__(self, app: ASGIApp, public_url: str | None) -> None:
        self._app = app
        self._public_netloc = "" if public_url is None else urlsplit(public_url).netloc.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._is_own(origin, headers.get("host", "")):
                refused = Forbidden(
                    "The request comes from a page of another site (its Origin header), which may "
                    "not change anything here."
                )
                problem = problems.from_error(refused, scope["path"])
                await problems.response(scope["app"], problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        # The origin "null", which a sandboxed page sends, has no netloc.
        return bool(netloc) and netloc in (host.lower(), self._public_netloc)


def _host_name(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""
