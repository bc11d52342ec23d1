"""Serve the API's description as a page: Swagger UI, from files that come with the package.

FastAPI's own pages load scripts and styles from a CDN: offline they stay blank.
"""

from functools import cache
from importlib.resources import files
from string import Template

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from service.pages.static_files import ASK_EACH_TIME, StaticFile, send, static_files

router = APIRouter(include_in_schema=False)


@cache
def _docs_page() -> StaticFile:
    template = files("service.pages").joinpath("templates", "docs.html").read_text("utf-8")
    page = Template(template).substitute(static=static_files().base)
    return StaticFile.of(page.encode(), "text/html; charset=utf-8")


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs(request: Request) -> Response:
    """Answer with the page."""
    return send(_docs_page(), request, ASK_EACH_TIME)


@router.api_route("/redoc", methods=["GET", "HEAD"])
async def redoc() -> Response:
    """Redirect to the page: a second one for the same description is not worth its weight."""
    return RedirectResponse("docs")
