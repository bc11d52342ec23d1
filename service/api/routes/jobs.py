"""Serve the routes of jobs: create, list, read, cancel, delete, fetch the video or its pictures.

The routes are synchronous functions, which FastAPI runs in its thread pool. So service and worker
share one synchronous `JobStore`. A Redis call takes well under a millisecond, and no route waits
for a job. Files are read in other threads (`service/api/downloads.py`).
"""

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from starlette.concurrency import run_in_threadpool

from jobs.errors import RecordUnreadable
from jobs.record import JobRecord
from jobs.spec import GenerationRequest, resolve_json
from jobs.state import JobState
from jobs.store.deletion import delete_job
from jobs.store.job_store import JobStore
from jobs.store.listing import MAX_PAGE, Wanted
from service.api.deps import (
    AppStateDep,
    DownloadsDep,
    IdempotencyKeyDep,
    JobViewsDep,
    JsonBodyDep,
    ListedOwnerDep,
    PrincipalDep,
    SpritesheetViewerDep,
    StoreDep,
    ThumbnailViewerDep,
    ViewerDep,
)
from service.api.moment import Moment
from service.api.openapi import (
    GENERATE_ANSWER,
    GENERATE_BODY,
    KEY_TAKEN,
    PICTURE_RESPONSES,
    VIDEO_RESPONSES,
    problem,
    problems,
)
from service.api.submit import REPLAYED_HEADER, accept
from service.api.video_response import (
    PictureResponse,
    RangeRequestDep,
    VideoResponse,
)
from service.auth.gate import Principal, visible_job
from service.schemas.jobs import JobGroupView, JobListView, JobView
from service.schemas.video_url import VideoFile
from service.webhooks.message import callbacks

router = APIRouter(tags=["jobs"])


@router.post(
    "/generate",
    status_code=202,
    response_model=JobView | JobGroupView,
    summary="Ask for a video",
    response_description="The queued job, or with a `count` the queued jobs; `Location` is the "
    "address.",
    responses={
        **GENERATE_ANSWER,
        **problems(400, 401, 403, 413, 415, 422, 429, 503),
        **problem(KEY_TAKEN, "/generate"),
    },
    openapi_extra={**GENERATE_BODY, **callbacks()},
)
def generate(
    # First, so that the body of an unauthenticated request is not read.
    principal: PrincipalDep,
    # Any JSON: `jobs.spec` reports malformed fields and broken bounds in one answer.
    body: JsonBodyDep,
    app_state: AppStateDep,
    views: JobViewsDep,
    idempotency_key: IdempotencyKeyDep = None,
) -> Response:
    """Check the request against what the live workers offer and queue it.

    Nothing is rounded: whatever is out of bounds is refused with 422, every field in one answer,
    and nothing is queued.
    """

    def resolve() -> tuple[GenerationRequest, str]:
        check_webhook = app_state.settings.webhook_rules.violation
        count_tokens = app_state.token_counter.count
        return resolve_json(body, app_state.catalog.get(), count_tokens, check_webhook)

    created = accept(app_state, principal, body, idempotency_key, resolve)
    is_group = created.job.group is not None
    address = f"?group={created.job.group}" if is_group else f"/{created.job.id}"
    headers = {"Location": f"{app_state.settings.public_path}/jobs{address}"}
    if created.replayed:
        headers[REPLAYED_HEADER] = "true"
    # Encoded here, because FastAPI would validate the view against its model a second time.
    view = views.group(created) if is_group else views.created(created)
    text = view.model_dump_json()
    return Response(text, 202, headers, media_type="application/json")


def _wanted(
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    mode: Annotated[str | None, Query(description="Only jobs in this mode.")] = None,
    group: Annotated[str | None, Query(description="Only the jobs of this group.")] = None,
    created_after: Annotated[
        Moment | None, Query(description="Only jobs created then or later.")
    ] = None,
    created_before: Annotated[
        Moment | None, Query(description="Only jobs created before then.")
    ] = None,
) -> Wanted:
    return Wanted(state, None, mode, group, created_after, created_before)


@router.get("/jobs", summary="List jobs, newest first", responses=problems(401, 403, 422, 429, 503))
def list_jobs(
    owner: ListedOwnerDep,
    store: StoreDep,
    views: JobViewsDep,
    wanted: Annotated[Wanted, Depends(_wanted)],
    # Bounds are checked by the store, which has the messages.
    limit: Annotated[int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAGE})] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> JobListView:
    """Page through the jobs of the last 30 days: one's own, or everybody's for ops.

    With `mode` or `group` a page may be short, or empty, and still have a `next_cursor`.
    """
    page = store.list(wanted.state, owner, limit, cursor, wanted=wanted)
    return JobListView(jobs=views.all(page.jobs), next_cursor=page.next_cursor)


@router.get("/jobs/{job_id}", summary="Read a job", responses=problems(401, 404, 422, 429, 503))
def read_job(principal: PrincipalDep, job_id: str, store: StoreDep, views: JobViewsDep) -> JobView:
    """Read the current state of a job. A failed job is answered with 200 and its `failure`."""
    return views.of(visible_job(store, principal, job_id))


@router.delete(
    "/jobs/{job_id}",
    response_model=JobView,
    summary="Cancel or delete a job",
    response_description="The job is cancelled, and will not run.",
    responses={
        204: {"description": "With `purge=true`: the job and its video are deleted."},
        202: {"model": JobView, "description": "The worker has been asked to stop."},
        **problems(401, 403, 404, 409, 422, 429, 503),
    },
)
async def cancel_job(
    principal: PrincipalDep,
    job_id: str,
    app_state: AppStateDep,
    views: JobViewsDep,
    response: Response,
    purge: Annotated[
        bool, Query(description="Delete the job for good, in whatever state, with its video.")
    ] = False,
) -> JobView | Response:
    """Cancel a queued job at once, or ask the worker of a running one to stop (202).

    The record stays. Cancelling a cancelled job changes nothing. With `purge=true` the job, its
    video and its record are deleted instead: nobody can read them from now on. A queued job will
    not run, a running one is stopped.
    """
    store = app_state.store
    if purge:
        with suppress(RecordUnreadable):  # such a record can only be deleted
            await run_in_threadpool(visible_job, store, principal, job_id)
        await app_state.downloads.run(delete_job, store, app_state.artifacts, job_id)
        return Response(status_code=204)

    def cancel() -> JobView:
        visible_job(store, principal, job_id)
        job = store.cancel(job_id)
        if not job.state.is_terminal:
            response.status_code = 202
        return views.of(job)

    return await run_in_threadpool(cancel)


_FILE_PROBLEMS = problems(400, 401, 403, 404, 410, 412, 416, 422, 429, 503)


@router.head("/jobs/{job_id}/video.mp4", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/video.mp4",
    summary="Fetch the video",
    response_class=VideoResponse,
    responses={**VIDEO_RESPONSES, **_FILE_PROBLEMS},
)
async def read_video(
    viewer: ViewerDep,
    job_id: str,
    store: StoreDep,
    downloads: DownloadsDep,
    range_request: RangeRequestDep,
) -> Response:
    """Fetch the MP4, whole or in ranges, with a key or by the signed link in the job's `video.url`.

    Its ETag is the file's SHA-256.
    """
    return await downloads.send(lambda: _viewed_job(store, viewer, job_id), range_request)


@router.head("/jobs/{job_id}/thumbnail.webp", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/thumbnail.webp",
    summary="Fetch the thumbnail",
    response_class=PictureResponse,
    responses={**PICTURE_RESPONSES, **_FILE_PROBLEMS},
)
async def read_thumbnail(
    viewer: ThumbnailViewerDep,
    job_id: str,
    store: StoreDep,
    downloads: DownloadsDep,
    range_request: RangeRequestDep,
) -> Response:
    """Fetch the middle frame, at most 320 px wide and high, like the video.

    The signed link is the job's `video.thumbnail_url`. 404 if none could be made.
    """
    return await downloads.send(
        lambda: _viewed_job(store, viewer, job_id), range_request, VideoFile.THUMBNAIL
    )


@router.head("/jobs/{job_id}/spritesheet.webp", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/spritesheet.webp",
    summary="Fetch the spritesheet",
    response_class=PictureResponse,
    responses={**PICTURE_RESPONSES, **_FILE_PROBLEMS},
)
async def read_spritesheet(
    viewer: SpritesheetViewerDep,
    job_id: str,
    store: StoreDep,
    downloads: DownloadsDep,
    range_request: RangeRequestDep,
) -> Response:
    """Fetch up to 25 small frames in a grid, like the video.

    The job's `video.spritesheet` has the grid and the signed link. 404 if none could be made.
    """
    return await downloads.send(
        lambda: _viewed_job(store, viewer, job_id), range_request, VideoFile.SPRITESHEET
    )


def _viewed_job(store: JobStore, viewer: Principal | None, job_id: str) -> JobRecord:
    """Read the job of a file; who has a signed link needs no key."""
    return store.get(job_id) if viewer is None else visible_job(store, viewer, job_id)
