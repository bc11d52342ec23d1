"""Serve what operators need: metrics, workers and queues."""

from fastapi import APIRouter, Request, Response
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from starlette.concurrency import run_in_threadpool

from service.api.deps import AppStateDep, BearerDep, OpsDep
from service.api.openapi import problems
from service.middleware.credentials import sent_credential
from service.monitoring.fleet import snapshot
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
async def read_metrics(request: Request, app_state: AppStateDep, _bearer: BearerDep) -> Response:
    """Show the metrics to ops.

    While Redis is down keys cannot be checked. Then the caller who read the metrics last, within an
    hour, sees what the process measures itself. Others see only that `wan_redis_up` is 0.
    """
    credential = sent_credential(request.headers)
    is_known = app_state.metrics_access.knows(credential)
    if await app_state.exposition.redis_answers():
        try:
            await run_in_threadpool(app_state.metrics_access.admit, credential)
            is_known = True
        except (RedisAway, RedisTimeout):
            pass  # it stopped answering just now
        except RedisError:
            # It answers, but refuses to write, and counting the request needs a write.
            if not is_known:
                raise
    text, media_type = await app_state.exposition.text(request.headers.get("accept", ""), is_known)
    return Response(text, media_type=media_type)


@router.get(
    "/workers",
    summary="Live workers and their queues",
    responses=problems(401, 403, 422, 429, 503),
)
def read_fleet(principal: OpsDep, app_state: AppStateDep) -> FleetView:
    """Show the state of each live worker, and what waits in each queue, to ops."""
    return FleetView.of(snapshot(app_state.redis))
