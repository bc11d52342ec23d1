"""Send a file from any store, such as a finished video, with ranges and conditional requests.

RFC 9110 lets a server ignore a Range header with several ranges, and players ask for one; a caller
that asks for several gets the whole file. A unit other than bytes is ignored, as it says, too.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from itertools import chain
from typing import Annotated

from fastapi import Depends, Header, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs.artifacts.store import ArtifactStore
from jobs.errors import AppError, PictureNotMade, VideoGone, VideoNotReady
from jobs.record import JobRecord, Picture, Video
from service.schemas.video_url import VideoFile

# Eighteen digits are enough for any file, and short enough to convert.
_RANGE = re.compile(r"(\d{1,18})-(\d{0,18})|-(\d{1,18})", re.ASCII)


class FileStream(StreamingResponse):
    """A file that is read while it is sent.

    Attributes:
        chunks: the bytes to send.
        while_sent: entered before the first byte is sent, and left after the last one.
    """

    def __init__(
        self,
        chunks: Iterator[bytes],
        status_code: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(chunks, status_code, headers)
        self.chunks = chunks
        self.while_sent: AbstractContextManager[None] = nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here, as an answer that was made may never be sent.
        with self.while_sent:
            await super().__call__(scope, receive, send)


class VideoResponse(FileStream):
    """An MP4 file, or a part of it."""

    media_type = "video/mp4"


class PictureResponse(FileStream):
    """A WebP file, or a part of it."""

    media_type = "image/webp"


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """The headers of a request that select a part of a file, or say what the caller has cached."""

    is_head: bool
    range_header: str | None
    if_range: str | None
    if_none_match: str | None
    if_match: str | None
    if_modified_since: str | None
    if_unmodified_since: str | None


def _range_request(
    request: Request,
    range_header: Annotated[str | None, Header(alias="range", examples=["bytes=0-1023"])] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> RangeRequest:
    headers = request.headers
    return RangeRequest(
        is_head=request.method == "HEAD",
        range_header=range_header,
        if_range=if_range,
        if_none_match=if_none_match,
        if_match=headers.get("if-match"),
        if_modified_since=headers.get("if-modified-since"),
        if_unmodified_since=headers.get("if-unmodified-since"),
    )


RangeRequestDep = Annotated[RangeRequest, Depends(_range_request)]


@dataclass(frozen=True, slots=True)
class SentFile:
    """A file in the store, and how it is sent.

    Attributes:
        what: what sentences call it.
        etag: without its quotes.
        modified: when it was made, in whole seconds; None to keep that to oneself.
        gone: the error if it is missing, or is not the one that was stored.
        shown_as: the header Content-Disposition; None for none.
    """

    key: str
    bytes: int
    what: str
    etag: str
    modified: datetime | None
    cache_control: str
    gone: AppError
    answer: type[FileStream] = VideoResponse
    shown_as: str | None = None

    @property
    def validators(self) -> dict[str, str]:
        """The headers that say which version of the file this is, and who may keep it."""
        headers = {"etag": f'"{self.etag}"', "cache-control": self.cache_control}
        if self.modified is not None:
            headers["last-modified"] = format_datetime(self.modified, usegmt=True)
        return headers


def send_video(
    artifacts: ArtifactStore,
    job: JobRecord,
    range_request: RangeRequest,
    file: VideoFile = VideoFile.VIDEO,
) -> Response:
    """Answer with the job's video or a picture of it, the requested part of it, or 304.

    Raises:
        VideoNotReady: the job has no video, or none yet.
        PictureNotMade: the video has no such picture.
        VideoGone: the artifact is missing, or is not the one that was stored.
        HTTPException: 400 or 416 for a range that cannot be read or served; 412 if the caller
            wants another version of the file.
    """
    stored = stored_file(job, file)
    sent = SentFile(
        key=stored.key,
        bytes=stored.bytes,
        what=file.value,
        etag=stored.sha256,
        modified=(job.finished_at or job.created_at).astimezone(UTC).replace(microsecond=0),
        # A job's files never change; they may only disappear.
        cache_control="private, max-age=3600",
        gone=VideoGone(
            f"The {file} of job {job.id} is no longer in the artifact store; generate the video "
            f"again with the same request and seed.",
            job_id=job.id,
        ),
        answer=VideoResponse if file is VideoFile.VIDEO else PictureResponse,
        shown_as=f'inline; filename="{_name(job.id, file)}"',
    )
    return send_file(artifacts, sent, range_request)


def send_file(artifacts: ArtifactStore, sent: SentFile, range_request: RangeRequest) -> Response:
    """Answer with a file, the requested part of it, or 304.

    Raises:
        AppError: `sent.gone`.
        HTTPException: see `send_video`.
    """
    if artifacts.size(sent.key) != sent.bytes:
        raise sent.gone
    headers = sent.validators
    if _wants_another(range_request, headers["etag"], sent.modified):
        detail = f"The {sent.what} is not the one that If-Match or If-Unmodified-Since asks for."
        raise HTTPException(412, detail, headers)
    if _has_it(range_request, headers["etag"], sent.modified):
        return Response(status_code=304, headers=headers)
    part = _part(range_request, (headers["etag"], headers.get("last-modified")), sent.bytes)
    headers["accept-ranges"] = "bytes"
    if sent.shown_as is not None:
        headers["content-disposition"] = sent.shown_as
    start, end = part or (0, sent.bytes)
    headers["content-length"] = str(end - start)
    if range_request.is_head:
        return Response(headers=headers, media_type=sent.answer.media_type)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{sent.bytes}"
    chunks = artifacts.read(sent.key, start, end)
    return sent.answer(_started(chunks), 200 if part is None else 206, headers)


def _name(job_id: str, file: VideoFile) -> str:
    """Return the name under which a browser saves the file."""
    return f"{job_id}{file.suffix}" if file is VideoFile.VIDEO else f"{job_id}-{file}{file.suffix}"


def stored_file(job: JobRecord, file: VideoFile) -> Video | Picture:
    """Return what the record says of a file; raises like `send_video`, but asks no store."""
    if job.video is None:
        raise VideoNotReady(
            f"Job {job.id} is {job.state}, so it has no {file}; only succeeded jobs have one.",
            job_id=job.id,
            state=job.state.value,
        )
    if job.video_deleted_at is not None:
        raise VideoGone(
            f"The {file} of job {job.id} was deleted when its time was over, on "
            f"{job.video_deleted_at:%Y-%m-%d}; generate it again with the same request and seed.",
            job_id=job.id,
        )
    pictures = {
        VideoFile.THUMBNAIL: job.video.thumbnail,
        VideoFile.SPRITESHEET: job.video.spritesheet,
    }
    stored = pictures.get(file, job.video)
    if stored is None:
        raise PictureNotMade(
            f"No {file} was made of the video of job {job.id}; fetch the video itself.",
            job_id=job.id,
        )
    return stored


def _wants_another(asked: RangeRequest, etag: str, modified: datetime | None) -> bool:
    """Return whether the file does not fit If-Match or, where that is missing, its date."""
    if asked.if_match is not None:
        # Compared strongly: weak tags never match.
        return not {tag.strip() for tag in asked.if_match.split(",")} & {etag, "*"}
    since = _date(asked.if_unmodified_since)
    return since is not None and modified is not None and modified > since


def _has_it(asked: RangeRequest, etag: str, modified: datetime | None) -> bool:
    """Return whether the caller has the file, by If-None-Match or, where missing, its date."""
    if asked.if_none_match is not None:
        tags = {tag.strip().removeprefix("W/") for tag in asked.if_none_match.split(",")}
        return bool(tags & {etag, "*"})
    since = _date(asked.if_modified_since)
    return since is not None and modified is not None and modified <= since


def _date(text: str | None) -> datetime | None:
    """Read a date of HTTP; None if there is none, or it cannot be read and is to be ignored."""
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _part(
    range_request: RangeRequest, validators: tuple[str, str | None], size: int
) -> tuple[int, int] | None:
    """Return the range to send, end exclusive, or None for the whole file.

    Args:
        validators: the file's ETag and Last-Modified, one of which If-Range has to be.
    """
    header = range_request.range_header
    if header is None or range_request.is_head:
        return None
    if range_request.if_range not in (None, *validators):
        return None
    unit, _, ranges = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    found = [_RANGE.fullmatch(each.strip()) for each in ranges.split(",")]
    if None in found:
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
            "The Range header asks for bytes beyond the end of the file.",
            {"content-range": f"bytes */{size}"},
        )
    return start, end


def _unreadable() -> HTTPException:
    return HTTPException(400, "The Range header cannot be read; write it as bytes=FIRST-LAST.")


def _started(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Read the first chunk now, so that an error of the store can still be answered as such."""
    return chain((next(chunks, b""),), chunks)
