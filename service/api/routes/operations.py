"""Serve what operators need: metrics, workers, queues, and what happened lately."""

from datetime import timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from starlette.concurrency import run_in_threadpool

from jobs.errors import WorkerNotFound
from jobs.record import now
from jobs.store import workers
from service.api.deps import AppState, AppStateDep, BearerDep, OpsDep
from service.api.moment import Moment
from service.api.openapi import problem, problems
from service.auth import audit
from service.auth.gate import Principal
from service.middleware.credentials import sent_credential
from service.monitoring.failures import read_failures
from service.monitoring.fleet import snapshot
from service.monitoring.fleet_details import read_details
from service.monitoring.series import LONGEST_H, read_series
from service.schemas.history import FailuresView, SeriesView
from service.schemas.operations import FleetView, WorkerStateView

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
    fleet = snapshot(app_state.redis)
    return FleetView.of(fleet, read_details(app_state.redis, fleet, app_state.waiting_shapes))


_NO_WORKER = WorkerNotFound(
    "There is no live worker wan-mini.0123456789ab; `GET /workers` lists them. A worker that "
    "starts again has another id."
)
_ORDER_PROBLEMS: Final = {
    **problems(401, 403, 404, 422, 429, 503),
    **problem(_NO_WORKER, "/workers/wan-mini.0123456789ab/drain"),
}


@router.post(
    "/workers/{worker_id}/drain",
    status_code=202,
    summary="Let a worker take no more jobs",
    response_description="The order is given; the worker obeys in a second or two.",
    responses=_ORDER_PROBLEMS,
)
def drain_worker(principal: OpsDep, worker_id: str, app_state: AppStateDep) -> WorkerStateView:
    """Let a worker end its current job and take no other until `resume`; its process lives on.

    It is `draining` until then, and `drained` afterwards. The order ends with the process.
    """
    return _order(principal, worker_id, app_state, drained=True)


@router.post(
    "/workers/{worker_id}/resume",
    status_code=202,
    summary="Let a drained worker take jobs again",
    response_description="The order is given; the worker obeys in a second or two.",
    responses=_ORDER_PROBLEMS,
)
def resume_worker(principal: OpsDep, worker_id: str, app_state: AppStateDep) -> WorkerStateView:
    """Take back the order to drain; a worker that is not under one goes on as it is."""
    return _order(principal, worker_id, app_state, drained=False)


def _order(
    principal: Principal, worker_id: str, app_state: AppState, *, drained: bool
) -> WorkerStateView:
    workers.order(app_state.redis, worker_id, principal.name, drained=drained)
    audit.note(principal, f"ordered worker {worker_id} to {'drain' if drained else 'resume'}")
    fleet = snapshot(app_state.redis)
    for worker in fleet.workers:
        if worker.id == worker_id:
            job_id = worker.status and worker.status.job_id
            return WorkerStateView.of(
                worker,
                read_details(app_state.redis, fleet, app_state.waiting_shapes).running.get(
                    job_id or ""
                ),
            )
    raise workers.not_found(worker_id)  # it ended meanwhile


@router.get(
    "/failures",
    summary="Jobs that failed lately, by code",
    responses=problems(401, 403, 422, 429, 503),
)
def list_failures(
    principal: OpsDep,
    app_state: AppStateDep,
    since: Annotated[
        Moment | None, Query(description="Since when; the last 24 hours if left out.")
    ] = None,
) -> FailuresView:
    """List the jobs that failed since then, by the time of their end; a week is known."""
    moment = since or now() - timedelta(hours=24)
    return FailuresView.of(moment, read_failures(app_state.redis, moment))


@router.get(
    "/series",
    summary="Jobs over time",
    responses=problems(401, 403, 422, 429, 503),
)
def show_series(
    principal: OpsDep,
    app_state: AppStateDep,
    hours: Annotated[
        int, Query(ge=1, le=LONGEST_H, description="How many hours to look back.")
    ] = 24,
) -> SeriesView:
    """Show how many jobs ended, how long they waited and how long they ran, by mode, over time."""
    return SeriesView.of(read_series(app_state.redis, hours))
