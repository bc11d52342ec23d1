"""Serve the index: what a program finds at the first address; browsers get a page there."""

from fastapi import APIRouter, Request

from service.api.deps import public_url
from service.api.known_query import refuse_unknown_parameters
from service.api.openapi import problems
from service.schemas.index import IndexView

router = APIRouter(tags=["index"])


@router.get("/", summary="Where is what?", responses=problems(422))
async def read_index(request: Request) -> IndexView:
    """Name the service, its version, and the addresses of the rest.

    A browser gets the page on which videos are made.
    """
    refuse_unknown_parameters(request)
    base = public_url(request)
    return IndexView(
        name=request.app.title,
        version=request.app.version,
        docs=f"{base}/docs",
        openapi=f"{base}/openapi.json",
        models=f"{base}/models",
        health=f"{base}/healthz",
    )
