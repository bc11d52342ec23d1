"""For those who run the service: its metrics, its workers and its queues."""

from fastapi import APIRouter, Request, Response
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from starlette.concurrency import run_in_threadpool

from service.api.deps import AppStateDep, BearerDep, OpsDep
from service.api.openapi import problems
from service.monitoring.fleet import look
from service.schemas.operations import FleetView

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "In Prometheus' text format, or OpenMetrics if that is asked for.",
            "content": {
                kind: {"schema": {"type": "string"}}
                for kind in ("text/plain", "application/openmetrics-text")
            },
        },
        **problems(401, 403, 429, 503),
    },
)
async def read_metrics(request: Request, parts: AppStateDep, bearer: BearerDep) -> Response:
    """Show the metrics to ops.

    Without Redis nobody can be asked who is ops. Then whoever could read the metrics within the
    last hour sees what the process measures itself, and others see only that `wan_redis_up` is 0.
    """
    token = None if bearer is None else bearer.credentials
    is_known = parts.readers.knows(token)
    if await parts.exposition.redis_answers():
        try:
            await run_in_threadpool(parts.readers.admit, token)
            is_known = True
        except (RedisAway, RedisTimeout):
            pass  # it went away just now
        except RedisError:
            # It answers, but will not write that somebody has asked.
            if not is_known:
                raise
    text, media_type = await parts.exposition.text(request.headers.get("accept", ""), is_known)
    return Response(text, media_type=media_type)


@router.get(
    "/workers",
    summary="Live workers and their queues",
    responses=problems(401, 403, 429, 503),
)
def read_fleet(principal: OpsDep, parts: AppStateDep) -> FleetView:
    """Show ops how each live worker is doing, and what waits in which queue."""
    return FleetView.of(look(parts.redis))
