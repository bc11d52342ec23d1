"""Serve `/v1/videos`: the same jobs as `/jobs`, for clients of OpenAI's Videos API.

They are programs, so a key is needed: a session's cookie opens nothing here.
"""

import time
from contextlib import suppress
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Response
from starlette.concurrency import run_in_threadpool

from jobs import ids
from jobs.errors import InvalidSpec, JobNotFound, RecordUnreadable
from jobs.record import JobRecord
from jobs.redis_keys import RECORD_TTL_S
from jobs.spec import GenerationRequest
from jobs.store.deletion import delete_job
from jobs.store.listing import MAX_PAGE
from jobs.violations import shown
from service.api.deps import AppState, AppStateDep, IdempotencyKeyDep, KeyDep
from service.api.openai.body import video_fields
from service.api.openai.job_progress import video_statuses
from service.api.openai.openapi import POLL_HEADER, VIDEO_ANSWER, create_answers, errors, video_body
from service.api.openai.request import video_request_to_spec
from service.api.openai.schemas import VideoDeleted, VideoList, VideoObject
from service.api.openapi import ANY_FILE_RESPONSES
from service.api.submit import REPLAYED_HEADER, accept
from service.api.video_response import RangeRequestDep, VideoResponse
from service.auth.gate import Principal, listed_owner, visible_job
from service.schemas.video_url import VideoFile

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
    # First, so that the body of an unauthenticated request is not read.
    principal: KeyDep,
    fields: FieldsDep,
    app_state: AppStateDep,
    response: Response,
    idempotency_key: IdempotencyKeyDep = None,
) -> VideoObject:
    """Check the request against what the live workers offer and queue it.

    Nothing is rounded: whatever is out of bounds is refused with 400, and nothing is queued.
    """

    def resolve() -> tuple[GenerationRequest, str]:
        check_webhook = app_state.settings.webhook_rules.violation
        return video_request_to_spec(
            fields, app_state.catalog.get(), app_state.token_counter.count, check_webhook
        )

    created = accept(app_state, principal, fields, idempotency_key, resolve)
    if created.replayed:
        response.headers[REPLAYED_HEADER] = "true"
    return _video_object(created.job, app_state, response)


@router.get("", summary="List videos", responses=errors(401, 422, 429, 503))
def list_videos(
    principal: KeyDep,
    app_state: AppStateDep,
    after: Annotated[str | None, Query(description="`last_id` of the page before.")] = None,
    limit: Annotated[
        int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAGE})
    ] = DEFAULT_PAGE,
    order: Annotated[Literal["asc", "desc"], Query(description="By creation.")] = "desc",
) -> VideoList:
    """Page through the jobs of the last 30 days: one's own, or everybody's for ops."""
    owner = listed_owner(principal, None)
    cursor = None if after is None else _cursor(after, principal, app_state)
    while True:
        page = app_state.store.list(
            owner=owner, limit=limit, cursor=cursor, oldest_first=order == "asc"
        )
        cursor = page.next_cursor
        # A page with only unreadable records is empty, and would look like the last one.
        if page.jobs or cursor is None:
            break
    found = video_statuses(app_state, page.jobs)
    data = [VideoObject.of(job, found[job.id]) for job in page.jobs]
    return VideoList.of(data, has_more=cursor is not None)


@router.post("/edits", include_in_schema=False)
@router.post("/extensions", include_in_schema=False)
@router.post("/characters", include_in_schema=False)
@router.get("/characters/{character_id}", include_in_schema=False)
@router.post("/{video_id}/remix", include_in_schema=False)
async def not_supported(_: KeyDep) -> None:
    """Answer 404 to what OpenAI's API has beside this: each works on a video, this on text."""
    raise HTTPException(
        404,
        "Edits, extensions, characters and remixes of videos are not supported: this service makes "
        "videos from text alone. Ask for a new one by POST /v1/videos.",
    )


@router.get(
    "/{video_id}",
    summary="Read a video object",
    responses={**VIDEO_ANSWER, **errors(401, 404, 422, 429, 503)},
)
def read_video(
    principal: KeyDep, video_id: str, app_state: AppStateDep, response: Response
) -> VideoObject:
    """Read the current state of a job. A failed job is answered with 200 and its `error`."""
    return _video_object(visible_job(app_state.store, principal, video_id), app_state, response)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    summary="Fetch the video",
    response_class=VideoResponse,
    responses={**ANY_FILE_RESPONSES, **errors(400, 401, 404, 412, 416, 422, 429, 503)},
)
async def read_content(
    principal: KeyDep,
    video_id: str,
    app_state: AppStateDep,
    range_request: RangeRequestDep,
    variant: Annotated[
        str,
        Query(
            description="The MP4, or a WebP of its middle frame or of a grid of its frames.",
            json_schema_extra={"enum": list(VideoFile)},
        ),
    ] = VideoFile.VIDEO.value,
) -> Response:
    """Fetch the MP4 or a picture of it, whole or in ranges."""
    return await app_state.downloads.send(
        lambda: visible_job(app_state.store, principal, video_id),
        range_request,
        _video_file(variant),
    )


@router.delete(
    "/{video_id}", summary="Delete a video", responses=errors(401, 403, 404, 422, 429, 503)
)
async def delete_video(principal: KeyDep, video_id: str, app_state: AppStateDep) -> VideoDeleted:
    """Delete the job, its video and its record, for good.

    A queued job will not run; a running one is stopped. Nobody can read it from now on.
    """
    with suppress(RecordUnreadable):  # such a record can only be deleted
        await run_in_threadpool(visible_job, app_state.store, principal, video_id)
    await app_state.downloads.run(delete_job, app_state.store, app_state.artifacts, video_id)
    return VideoDeleted(id=video_id)


def _video_object(job: JobRecord, app_state: AppStateDep, response: Response) -> VideoObject:
    """Build the video object, and set the header that says when to poll again."""
    video_status = video_statuses(app_state, [job])[job.id]
    if not job.state.is_terminal:
        response.headers[POLL_HEADER] = str(video_status.poll_after_ms)
    return VideoObject.of(job, video_status)


def _video_file(variant: str) -> VideoFile:
    try:
        return VideoFile(variant)
    except ValueError:
        offered = ", ".join(VideoFile)
        raise InvalidSpec.of(
            "variant",
            shown(variant),
            offered,
            f"variant {shown(variant)} is not offered; ask for one of {offered}.",
        ) from None


def _cursor(after: str, principal: Principal, app_state: AppState) -> str:
    try:
        visible_job(app_state.store, principal, after)
    except RecordUnreadable:
        pass  # it is there, and pages leave it out
    except JobNotFound as error:
        made_at = ids.timestamp_of(after)
        if made_at is not None and -RECORD_TTL_S < made_at - time.time() <= 0:
            # It may have been deleted since the page before, as by who deletes while listing.
            return ids.cursor_after(after)
        detail = f"after is {shown(after)}, which is not the id of a video; take last_id of a page."
        raise InvalidSpec.of("after", shown(after), "the id of a video", detail) from error
    return ids.cursor_after(after)
