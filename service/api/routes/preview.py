"""Serve the newest preview of a running job."""

import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from jobs.errors import NoPreview
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store.live.previews import read_preview
from service.api.deps import AppStateDep, PrincipalDep
from service.api.openapi import PREVIEW_RESPONSES, problems
from service.auth.gate import visible_job

router = APIRouter(tags=["jobs"])


class PreviewResponse(Response):
    """An animated WebP of a job that runs."""

    media_type = "image/webp"


@router.get(
    "/jobs/{job_id}/preview.webp",
    summary="See what a running job looks like so far",
    response_class=PreviewResponse,
    responses={**PREVIEW_RESPONSES, **problems(401, 404, 422, 429, 503)},
)
def read_job_preview(
    principal: PrincipalDep,
    job_id: str,
    app_state: AppStateDep,
    number: Annotated[  # it only makes the address another one
        int | None,
        Query(
            ge=0,
            description="Of the preview, as in `preview_url`: so that a page that shows another "
            "one has another address to load. The newest is sent whatever it says.",
        ),
    ] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Fetch the newest preview: a small animated WebP of what the model predicts so far.

    It is there while the job runs, from its first steps on, if the worker makes previews. A
    `preview` event announces each new one. Its ETag is its SHA-256, and it must not be stored.
    """
    job = visible_job(app_state.store, principal, job_id)
    picture = read_preview(app_state.redis, job.id)
    if picture is None:
        raise NoPreview(_why_none(job), job_id=job.id, state=job.state.value)
    etag = f'"{hashlib.sha256(picture).hexdigest()}"'
    headers = {"etag": etag, "cache-control": "no-store"}
    tags = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    if tags & {etag, "*"}:
        return Response(status_code=304, headers=headers)
    headers["content-disposition"] = f'inline; filename="{job.id}-preview.webp"'
    return PreviewResponse(picture, headers=headers)


def _why_none(job: JobRecord) -> str:
    if job.state.is_terminal:
        return (
            f"Job {job.id} has {_ended(job.state)}, and previews are deleted at the end; read the "
            f"job for its result."
        )
    if job.state is JobState.QUEUED:
        return f"Job {job.id} waits in its queue; a preview comes once it runs."
    return (
        f"Job {job.id} runs and has no preview yet; the first comes with its first steps, unless "
        f"its worker makes none."
    )


def _ended(state: JobState) -> str:
    return "been cancelled" if state is JobState.CANCELLED else state.value
