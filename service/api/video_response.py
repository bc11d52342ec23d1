"""Send a finished video from any artifact store, with ranges and conditional requests.

RFC 9110 lets a server ignore a Range header with several ranges, and players ask for one; a caller
that asks for several gets the whole file. There is no Last-Modified, so only the ETag is compared.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

from fastapi import Depends, Header, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from jobs.artifacts.store import ArtifactStore
from jobs.errors import VideoGone, VideoNotReady
from jobs.record import JobRecord, Video

# Eighteen digits are enough for any file, and short enough to convert.
_RANGE = re.compile(r"(\d{1,18})-(\d{0,18})|-(\d{1,18})", re.ASCII)


class VideoResponse(StreamingResponse):
    """An MP4 file, or a part of it."""

    media_type = "video/mp4"


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """The headers of a request that select a part of a video, or say what the caller has cached."""

    is_head: bool
    range_header: str | None
    if_range: str | None
    if_none_match: str | None


def _range_request(
    request: Request,
    range_header: Annotated[str | None, Header(alias="range", examples=["bytes=0-1023"])] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> RangeRequest:
    return RangeRequest(request.method == "HEAD", range_header, if_range, if_none_match)


RangeRequestDep = Annotated[RangeRequest, Depends(_range_request)]


def send_video(artifacts: ArtifactStore, job: JobRecord, range_request: RangeRequest) -> Response:
    """Answer with the job's video, the requested part of it, or 304.

    Raises:
        VideoNotReady: the job has no video, or none yet.
        VideoGone: the artifact is missing, or is not the one that was stored.
        HTTPException: 400 or 416 for a range that cannot be read or served.
    """
    video = _stored_video(artifacts, job)
    etag = f'"{video.sha256}"'
    # A job's video never changes; it may only disappear.
    headers = {"etag": etag, "cache-control": "private, max-age=3600"}
    cached = (range_request.if_none_match or "").split(",")
    if {tag.strip().removeprefix("W/") for tag in cached} & {etag, "*"}:
        return Response(status_code=304, headers=headers)
    headers |= {
        "accept-ranges": "bytes",
        "content-disposition": f'inline; filename="{job.id}.mp4"',
    }
    part = _part(range_request, etag, video.bytes)
    start, end = part or (0, video.bytes)
    headers["content-length"] = str(end - start)
    if range_request.is_head:
        return Response(headers=headers, media_type=VideoResponse.media_type)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{video.bytes}"
    chunks = artifacts.read(video.key, start, end)
    return VideoResponse(_started(chunks), 200 if part is None else 206, headers)


def _stored_video(artifacts: ArtifactStore, job: JobRecord) -> Video:
    if job.video is None:
        raise VideoNotReady(
            f"Job {job.id} is {job.state}, so it has no video; only succeeded jobs have one.",
            job_id=job.id,
            state=job.state.value,
        )
    if job.video_deleted_at is not None:
        raise VideoGone(
            f"The video of job {job.id} was deleted when its time was over, on "
            f"{job.video_deleted_at:%Y-%m-%d}; generate it again with the same request and seed.",
            job_id=job.id,
        )
    if artifacts.size(job.video.key) != job.video.bytes:
        raise VideoGone(
            f"The video of job {job.id} is no longer in the artifact store; generate it again "
            f"with the same request and seed.",
            job_id=job.id,
        )
    return job.video


def _part(range_request: RangeRequest, etag: str, size: int) -> tuple[int, int] | None:
    """Return the range to send, end exclusive, or None for the whole file."""
    header = range_request.range_header
    if header is None or range_request.is_head or range_request.if_range not in (None, etag):
        return None
    unit, _, ranges = header.partition("=")
    found = [_RANGE.fullmatch(each.strip()) for each in ranges.split(",")]
    if unit.strip().lower() != "bytes" or None in found:
        raise _unreadable()
    if len(found) > 1:
        return None
    assert found[0] is not None, "a range that does not match was refused"
    first, last, suffix = found[0].groups()
    if suffix is not None:
        start, end = max(0, size - int(suffix)), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            raise _unreadable()
    if start >= size:
        raise HTTPException(
            416,
            "The Range header asks for bytes beyond the end of the video.",
            {"content-range": f"bytes */{size}"},
        )
    return start, end


def _unreadable() -> HTTPException:
    return HTTPException(400, "The Range header cannot be read; write it as bytes=FIRST-LAST.")


def _started(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Read the first chunk now, so that an error of the store can still be answered as such."""
    return chain((next(chunks, b""),), chunks)
