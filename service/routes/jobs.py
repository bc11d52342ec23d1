"""Jobs: create, list, read, cancel, and fetch the video.

The routes are plain functions, which FastAPI runs in its thread pool: one synchronous `JobStore`
serves service and worker alike, a Redis call takes well under a millisecond, and no route waits
for a job.
"""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from jobs.errors import VideoGone, VideoNotReady
from jobs.spec import resolve_json
from jobs.state import JobState
from jobs.store import MAX_PAGE
from service.deps import ArtifactsDep, BaseUrlDep, CatalogDep, JsonBodyDep, StoreDep, TokensDep
from service.openapi import GENERATE_ANSWER, GENERATE_BODY, VIDEO_RESPONSES, problems
from service.video import VideoResponse
from service.views import JobListView, JobView

router = APIRouter(tags=["jobs"])


@router.post(
    "/generate",
    status_code=202,
    summary="Ask for a video",
    response_description="The queued job; `Location` is its address.",
    responses={**GENERATE_ANSWER, **problems(400, 413, 422, 503)},
    openapi_extra=GENERATE_BODY,
)
def generate(
    # Any JSON: jobs.spec reports malformed fields and broken bounds in one answer.
    body: JsonBodyDep,
    catalog: CatalogDep,
    store: StoreDep,
    tokens: TokensDep,
    base_url: BaseUrlDep,
    response: Response,
) -> JobView:
    """Check the request against what the live workers offer and queue it.

    Nothing is rounded: whatever is out of bounds is refused with 422, every field in one answer,
    and nothing is queued.
    """
    request, queue = resolve_json(body, catalog, tokens.count)
    job = store.create(request, queue)
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobView.of(job, base_url)


@router.get("/jobs", summary="List jobs, newest first", responses=problems(422, 503))
def list_jobs(
    store: StoreDep,
    base_url: BaseUrlDep,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    # The store has the sentences for what is out of bounds.
    limit: Annotated[int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAGE})] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> JobListView:
    """Page through the jobs of the last 30 days."""
    page = store.list(state=state, limit=limit, cursor=cursor)
    views = [JobView.of(job, base_url) for job in page.jobs]
    return JobListView(jobs=views, next_cursor=page.next_cursor)


@router.get("/jobs/{job_id}", summary="Read a job", responses=problems(404, 503))
def read_job(job_id: str, store: StoreDep, base_url: BaseUrlDep) -> JobView:
    """Read a job as it stands. A failed job is answered with 200 and its `failure`."""
    return JobView.of(store.get(job_id), base_url)


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job",
    response_description="The job is cancelled, and will not run.",
    responses={
        202: {"model": JobView, "description": "The worker has been asked to stop."},
        **problems(404, 409, 503),
    },
)
def cancel_job(job_id: str, store: StoreDep, base_url: BaseUrlDep, response: Response) -> JobView:
    """Cancel a queued job at once, or ask the worker of a running one to stop (202).

    The record stays. Cancelling a cancelled job changes nothing.
    """
    job = store.cancel(job_id)
    if not job.state.is_terminal:
        response.status_code = 202
    return JobView.of(job, base_url)


@router.head("/jobs/{job_id}/video.mp4", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/video.mp4",
    summary="Fetch the video",
    response_class=VideoResponse,
    responses={**VIDEO_RESPONSES, **problems(400, 404, 410, 416, 503)},
)
def read_video(
    job_id: str,
    store: StoreDep,
    artifacts: ArtifactsDep,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Fetch the MP4, whole or in ranges. Its ETag is the file's SHA-256."""
    job = store.get(job_id)
    if job.video is None:
        raise VideoNotReady(
            f"Job {job_id} is {job.state}, so it has no video; only succeeded jobs have one.",
            job_id=job_id,
            state=job.state.value,
        )
    path = artifacts.path(job.video.key)
    if not path.is_file():
        raise VideoGone(
            f"The video of job {job_id} is no longer in the artifact store; generate it again "
            f"with the same request and seed.",
            job_id=job_id,
        )
    return VideoResponse.of(path, job.id, job.video.sha256, if_none_match)
