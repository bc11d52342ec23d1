"""What happens to a job, as it happens."""

from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Response
from starlette.concurrency import run_in_threadpool

from jobs.store import events
from service.api.deps import AppStateDep, JobViewsDep, PrincipalDep
from service.api.events.hub import Follower
from service.api.events.stream import EventStream
from service.api.openapi import EVENT_ANSWER, problems
from service.auth.gate import visible_job

router = APIRouter(tags=["jobs"])

_ID: Final = r"^[0-9]{1,19}-[0-9]{1,19}$"


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
    parts: AppStateDep,
    views: JobViewsDep,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", pattern=_ID, description="Send only what came after it."),
    ] = None,
    query_id: Annotated[
        str | None,
        Query(
            alias="last_event_id",
            pattern=_ID,
            description="The same, for who cannot set headers.",
        ),
    ] = None,
) -> Response:
    """Follow a job by server-sent events, from its creation or from `Last-Event-ID`, to its end.

    `state` and `progress` have ids, so an EventSource that loses its connection misses nothing;
    the last `state` brings the whole job. While the job is queued, `queue` says where it stands.
    Who comes back after the last event is answered with 204, and an EventSource ends then.
    """
    job = await run_in_threadpool(visible_job, parts.store, principal, job_id)
    after = last_event_id or query_id or events.START
    if job.state.is_terminal and not (await parts.hub.read(job_id, after)).told:
        return Response(status_code=204)
    return EventStream(
        parts.hub,
        Follower(job, None if principal.sees_all else principal.owner),
        after,
        parts.settings.heartbeat_s,
        lambda: views.of(parts.store.get(job_id)),
    )
