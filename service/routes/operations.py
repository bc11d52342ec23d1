"""For those who run the service: its metrics, its workers and its queues."""

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from service.deps import BearerDep, OpsDep, PartsDep
from service.fleet import look
from service.openapi import problems
from service.views_operations import FleetView

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "In Prometheus' text format, or OpenMetrics if that is asked for."},
        **problems(401, 403, 429, 503),
    },
)
async def read_metrics(request: Request, parts: PartsDep, bearer: BearerDep) -> Response:
    """Show the metrics to ops. Without Redis, `wan_redis_up` is 0, and the process shows its own.

    Nobody can be asked for then, so whoever could read the metrics a moment before still can.
    """
    token = None if bearer is None else bearer.credentials
    if await parts.exposition.redis_answers() or not parts.readers.knows(token):
        await run_in_threadpool(parts.readers.admit, token)
    text, media_type = await parts.exposition.text(request.headers.get("accept", ""))
    return Response(text, media_type=media_type)


@router.get(
    "/workers",
    summary="Live workers and their queues",
    responses=problems(401, 403, 429, 503),
)
def read_fleet(principal: OpsDep, parts: PartsDep) -> FleetView:
    """Show ops how each live worker is doing, and what waits in which queue."""
    return FleetView.of(look(parts.redis))
