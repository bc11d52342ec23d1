"""Refuse requests that a web page of another site makes its visitor's browser send.

Any page can make a browser send requests to 127.0.0.1. The page's own host name may resolve to this
service (DNS rebinding; prevented by the Host check), or the page may submit a form to it (prevented
by the Origin check). A service that requires keys is safe from both, an open one is not. Neither is
one whose visitor is signed in, because browsers add the cookie to every request by themselves.
"""

from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.errors import Forbidden
from service.auth.sessions import SessionToken
from service.middleware import problems
from service.middleware.credentials import sent_credential
from service.settings import is_loopback, origin_of

SESSION_PATH: Final = "/session"
JOIN_PATH: Final = "/rating/join"
COOKIE_PATHS: Final = frozenset({SESSION_PATH, JOIN_PATH})
"""Only the service's own pages sign in and out; the browser keeps the cookie for them alone."""

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

    - A request with an Origin passes if it comes from the service's own pages, whose origin is the
      name in Host or that of `public_url`, or with a key from one of `allowed_origins`.
    - A request with a session's cookie passes if the browser says by Sec-Fetch-Site that it comes
      from the service's own page, or from the visitor. Browsers leave that header out where the
      service has a name without TLS; then Origin has to be there, and to be the service's own.
    - Other requests without Origin pass, because only browsers send it.
    """

    def __init__(
        self, app: ASGIApp, public_url: str | None, allowed_origins: Collection[str] = ()
    ) -> None:
        self._app = app
        self._public_origin = None if public_url is None else origin_of(public_url)
        self._public_netloc = urlsplit(self._public_origin or "").netloc
        self._allowed_origins = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            refusal = self._refusal(Headers(scope=scope), scope["path"])
            if refusal is not None:
                problem = problems.from_error(Forbidden(refusal), scope["path"])
                await problems.response(scope["app"], problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> str | None:
        """Return why the request is refused; None if it may pass."""
        origin, host = headers.get("origin"), headers.get("host", "")
        credential = sent_credential(headers)
        if origin is not None and not self._is_own(origin, host):
            has_key = isinstance(credential, str)
            if origin in self._allowed_origins and has_key and path not in COOKIE_PATHS:
                return None
            return (
                "The request comes from a page of another site (its Origin header), which may "
                "not change anything here."
            )
        if isinstance(credential, SessionToken) and not self._is_from_own_page(headers):
            return (
                "The request has a session's cookie and does not come from a page of this service, "
                "by its headers Sec-Fetch-Site and Origin; send an API key instead."
            )
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        netloc = _netloc(origin)
        return bool(netloc) and netloc in (host.lower(), self._public_netloc)

    def _is_from_own_page(self, headers: Headers) -> bool:
        """Return whether a request with a cookie is one that the service's own page sends."""
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        origin, host = headers.get("origin", ""), headers.get("host", "")
        # With the scheme: anybody on the way can make a page of the same name without TLS.
        if origin == self._public_origin:
            return True
        has_own_name = self._public_origin is None or is_loopback(_host_name(host))
        return has_own_name and bool(host) and _netloc(origin) == host.lower()


def _netloc(origin: str) -> str:
    """Return the name and port of an origin; "null", which a sandboxed page sends, has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""
