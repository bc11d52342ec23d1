"""Send a finished video: Range and conditional requests, errors as problem documents."""

from pathlib import Path
from typing import Self

from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from service import problems

_BAD_RANGE = {
    400: "The Range header cannot be read; write it as bytes=FIRST-LAST.",
    416: "The Range header asks for bytes beyond the end of the video.",
}


class VideoResponse(FileResponse):
    """An MP4 file. Starlette's plain-text answers to bad ranges become problem documents."""

    media_type = "video/mp4"

    @classmethod
    def of(cls, path: Path, job_id: str, sha256: str, if_none_match: str | None) -> Self | Response:
        """Answer with the file, or with 304 if the caller already has it."""
        etag = f'"{sha256}"'
        # A job's video never changes; it may only disappear.
        headers = {"etag": etag, "cache-control": "private, max-age=3600"}
        held = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
        if held & {etag, "*"}:
            return Response(status_code=304, headers=headers)
        return cls(
            path,
            headers=headers,
            media_type=cls.media_type,
            filename=f"{job_id}.mp4",
            content_disposition_type="inline",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message | None = None

        async def send_or_hold(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in _BAD_RANGE:
                refused = message
            elif refused is None:
                await send(message)

        await super().__call__(scope, receive, send_or_hold)
        if refused is not None:
            status = refused["status"]
            problem = problems.from_status(status, _BAD_RANGE[status], scope["path"])
            kept = {
                name.decode(): value.decode()
                for name, value in refused["headers"]
                if name == b"content-range"
            }
            await problems.response(problem, kept)(scope, receive, send)
