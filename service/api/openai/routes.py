"""`/v1/videos`: the same jobs as everywhere, for the clients of OpenAI's Videos API."""

from contextlib import suppress
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Response

from jobs import ids
from jobs.errors import InvalidSpec, JobNotFound, RecordUnreadable
from jobs.record import JobRecord
from jobs.spec import GenerationRequest, shown
from jobs.store.deletion import delete_job
from jobs.store.job_store import MAX_PAGE
from service.api.deps import AppStateDep, IdempotencyKeyDep, PrincipalDep
from service.api.openai.body import video_fields
from service.api.openai.job_progress import outlooks
from service.api.openai.openapi import POLL_HEADER, VIDEO_ANSWER, create_answers, errors, video_body
from service.api.openai.request import resolve_video
from service.api.openai.schemas import VideoDeleted, VideoList, VideoObject
from service.api.openapi import VIDEO_RESPONSES
from service.api.submit import REPLAYED_HEADER, accept
from service.api.video_response import VideoResponse, WantedDep, send_video
from service.auth.gate import listed_owner, visible_job

router = APIRouter(prefix="/v1/videos", tags=["videos"])

DEFAULT_PAGE: Final = 20

FieldsDep = Annotated[Any, Depends(video_fields)]


@router.post(
    "",
    summary="Ask for a video",
    response_description="The queued job.",
    responses=create_answers(),
    openapi_extra=video_body(),
)
def create_video(
    # First: a stranger's body is not even read.
    principal: PrincipalDep,
    fields: FieldsDep,
    parts: AppStateDep,
    response: Response,
    idempotency_key: IdempotencyKeyDep = None,
) -> VideoObject:
    """Check the request against what the live workers offer and queue it.

    Nothing is rounded: whatever is out of bounds is refused with 400, and nothing is queued.
    """

    def resolve() -> tuple[GenerationRequest, str]:
        check_webhook = parts.settings.webhook_rules.violation
        return resolve_video(fields, parts.catalog.get(), parts.tokens.count, check_webhook)

    created = accept(parts, principal, fields, idempotency_key, resolve)
    if created.replayed:
        response.headers[REPLAYED_HEADER] = "true"
    return _described(created.job, parts, response)


@router.get("", summary="List videos", responses=errors(401, 422, 429, 503))
def list_videos(
    principal: PrincipalDep,
    parts: AppStateDep,
    after: Annotated[str | None, Query(description="`last_id` of the page before.")] = None,
    limit: Annotated[
        int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAGE})
    ] = DEFAULT_PAGE,
    order: Annotated[Literal["asc", "desc"], Query(description="By creation.")] = "desc",
) -> VideoList:
    """Page through the jobs of the last 30 days: one's own, or everybody's for ops."""
    owner = listed_owner(principal, None)
    cursor = None if after is None else _cursor(after)
    while True:
        page = parts.store.list(
            owner=owner, limit=limit, cursor=cursor, oldest_first=order == "asc"
        )
        cursor = page.next_cursor
        # A page of nothing but records that cannot be read would look like the end.
        if page.jobs or cursor is None:
            break
    found = outlooks(parts, page.jobs)
    data = [VideoObject.of(job, found[job.id]) for job in page.jobs]
    return VideoList.of(data, has_more=cursor is not None)


@router.get(
    "/{video_id}",
    summary="Read a video object",
    responses={**VIDEO_ANSWER, **errors(401, 404, 429, 503)},
)
def read_video(
    principal: PrincipalDep, video_id: str, parts: AppStateDep, response: Response
) -> VideoObject:
    """Read a job as it stands. A failed job is answered with 200 and its `error`."""
    return _described(visible_job(parts.store, principal, video_id), parts, response)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    summary="Fetch the video",
    response_class=VideoResponse,
    responses={**VIDEO_RESPONSES, **errors(400, 401, 404, 416, 422, 429, 503)},
)
def read_content(
    principal: PrincipalDep,
    video_id: str,
    parts: AppStateDep,
    wanted: WantedDep,
    variant: Annotated[
        str, Query(description="Only `video` is offered.", json_schema_extra={"enum": ["video"]})
    ] = "video",
) -> Response:
    """Fetch the MP4, whole or in ranges. Thumbnails and sprite sheets are not made."""
    if variant != "video":
        raise InvalidSpec.of(
            "variant",
            shown(variant),
            "video",
            f"variant {shown(variant)} is not offered: only the video itself is kept; ask for "
            f"video, or leave variant out.",
        )
    return send_video(parts.artifacts, visible_job(parts.store, principal, video_id), wanted)


@router.delete("/{video_id}", summary="Delete a video", responses=errors(401, 403, 404, 429, 503))
def delete_video(principal: PrincipalDep, video_id: str, parts: AppStateDep) -> VideoDeleted:
    """Delete the job, its video and its record, for good.

    A queued job will not run; a running one is stopped. Nobody can read it from now on.
    """
    with suppress(RecordUnreadable):  # deleting is the way to be rid of it
        visible_job(parts.store, principal, video_id)
    delete_job(parts.store, parts.artifacts, video_id)
    return VideoDeleted(id=video_id)


def _described(job: JobRecord, parts: AppStateDep, response: Response) -> VideoObject:
    outlook = outlooks(parts, [job])[job.id]
    if not job.state.is_terminal:
        response.headers[POLL_HEADER] = str(outlook.poll_after_ms)
    return VideoObject.of(job, outlook)


def _cursor(after: str) -> str:
    try:
        return ids.cursor_after(ids.checked(after))
    except JobNotFound as error:
        detail = f"after is {shown(after)}, which is not the id of a video; take last_id of a page."
        raise InvalidSpec.of("after", shown(after), "the id of a video", detail) from error
