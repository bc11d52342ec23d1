"""Serve the events of a job as a stream."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.concurrency import run_in_threadpool

from jobs.store.live import events
from service.api.deps import AppStateDep, JobViewsDep, PrincipalDep
from service.api.events.hub import Follower
from service.api.events.stream import EventStream
from service.api.openapi import EVENT_ANSWER, problems
from service.auth.gate import visible_job

router = APIRouter(tags=["jobs"])


@router.get(
    "/jobs/{job_id}/events",
    status_code=200,  # FastAPI cannot read it from the class
    summary="Follow a job",
    response_class=EventStream,
    responses={**EVENT_ANSWER, **problems(401, 404, 422, 429, 503)},
)
async def follow_job(
    principal: PrincipalDep,
    job_id: str,
    app_state: AppStateDep,
    views: JobViewsDep,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            pattern=events.EVENT_ID_PATTERN,
            description="Send only what came after it.",
        ),
    ] = None,
    query_id: Annotated[
        str | None,
        Query(
            alias="last_event_id",
            pattern=events.EVENT_ID_PATTERN,
            description="The same, for who cannot set headers.",
        ),
    ] = None,
) -> Response:
    """Follow a job by server-sent events, from its creation or from `Last-Event-ID`, to its end.

    `state` and `progress` have ids, so an EventSource that loses its connection misses nothing. The
    last `state` has the whole job. While the job is queued, `queue` gives its position. A client
    that reconnects after the last event is answered with 204, which ends an EventSource.
    """
    job = await run_in_threadpool(visible_job, app_state.store, principal, job_id)
    after = last_event_id or query_id or events.START
    if job.state.is_terminal and not (await app_state.hub.read(job_id, after)).events:
        return Response(status_code=204)
    return EventStream(
        app_state.hub,
        Follower(job, None if principal.sees_all else principal.owner),
        after,
        app_state.settings.heartbeat_s,
        lambda: views.of(app_state.store.get(job_id)),
    )
