"""Serve the health checks: whether the process is alive, and whether it can run jobs."""

from fastapi import APIRouter

from jobs.errors import NoLiveWorker
from service.api.deps import AppStateDep
from service.api.openapi import problems
from service.schemas.health import HealthView, ReadyView

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process alive?", responses=problems())
async def healthz() -> HealthView:
    """Answer whenever the process does, without the thread pool and without Redis."""
    return HealthView()


@router.get(
    "/readyz",
    summary="Can jobs be run?",
    responses=problems(503),
    response_model_exclude_none=True,
)
async def readyz(app_state: AppStateDep) -> ReadyView:
    """Answer 200 when Redis is reachable and at least one worker is live; within two seconds."""
    workers = await app_state.readiness.workers()
    if not workers.live:
        why = f" Out of service: {' '.join(workers.faults)}" if workers.faults else ""
        raise NoLiveWorker(f"Redis is reachable, but no worker is live.{why}")
    warnings = app_state.checks.warnings()
    return ReadyView(
        status="degraded" if warnings else "ready",
        workers=workers.live,
        degraded=workers.degraded,
        faults=list(workers.faults) or None,
        warnings=warnings or None,
    )
