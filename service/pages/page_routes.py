"""Serve the web pages: shells without data, which get everything from the public API by scripts.

Some addresses are both a page and a resource of the API: `GET /jobs/{job_id}` is a page for
browsers and JSON for programs, chosen by what the caller accepts. So a link to a job can be given
to either.
"""

from functools import cache
from typing import Final

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.pages.negotiation import VARY_BY_ACCEPT, prefers_html
from service.pages.static_files import ASK_EACH_TIME, StaticFile, send, static_files

SHARED_PAGES: Final = {
    "/": "demo.html",
    "/jobs/{job_id}": "job.html",
    "/comparisons": "comparisons.html",
    "/comparisons/{comparison_id}": "comparison.html",
    "/comparisons/{comparison_id}/report": "report.html",
}
"""The templates of pages at addresses that the API has, too."""

OWN_PAGES: Final = {"/ops": "ops.html", "/rate": "rate.html"}
"""The templates of pages at addresses of their own."""


class BrowserRoute(APIRoute):
    """A route that exists for callers who would rather have a page than JSON, and for GET only."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match like any route, but programs never."""
        match, child_scope = super().matches(scope)
        if match is Match.FULL and not _wants_page(scope):
            return Match.NONE, {}
        return (match, child_scope) if match is Match.FULL else (Match.NONE, {})


shared_router = APIRouter(include_in_schema=False, route_class=BrowserRoute)
router = APIRouter(include_in_schema=False)


async def _page(request: Request) -> Response:
    template = request.scope["route"].name
    # Relative, because a proxy may add a prefix.
    root = "../" * (request.url.path.count("/") - 1) or "./"
    return send(_rendered(template, root), request, ASK_EACH_TIME)


for _path, _template in SHARED_PAGES.items():
    shared_router.add_api_route(_path, _page, methods=["GET"], name=_template)
for _path, _template in OWN_PAGES.items():
    router.add_api_route(_path, _page, methods=["GET"], name=_template)


class VaryByAccept:
    """ASGI middleware: names the header by which page or JSON was chosen in both answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._routes = [route for route in shared_router.routes if isinstance(route, APIRoute)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not any(
            route.path_regex.match(scope["path"]) for route in self._routes
        ):
            await self._app(scope, receive, send)
            return

        async def send_with_vary(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).add_vary_header(VARY_BY_ACCEPT["Vary"])
            await send(message)

        await self._app(scope, receive, send_with_vary)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("service.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _rendered(template: str, root: str) -> StaticFile:
    page = _environment().get_template(template)
    html = page.render(root=root, static=root + static_files().base)
    return StaticFile.of(html.encode(), "text/html; charset=utf-8")


def _wants_page(scope: Scope) -> bool:
    return prefers_html(",".join(Headers(scope=scope).getlist("accept")))
