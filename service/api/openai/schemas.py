"""Define the video objects that OpenAI's clients see, with some keys of this service's own."""

from datetime import datetime
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from jobs.record import JobRecord, Stage
from jobs.state import JobState
from service.api.openai.job_progress import VideoStatus
from service.schemas.jobs import notes_on

_STATUS: Final = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",
}
_PERCENT: Final = {
    Stage.TEXT_ENCODER: (0, 2),
    Stage.DENOISE: (2, 90),
    Stage.VAE: (90, 98),
    Stage.MP4: (98, 99),
}
"""The percentages at which each stage begins and ends; 100 only for a finished video."""

_EXAMPLE: dict[str, Any] = {
    "id": "01a2039b8ee84d074d36452736a1b6c7",
    "object": "video",
    "model": "wan-mini:w8a8",
    "status": "in_progress",
    "progress": 46,
    "created_at": 1795356856,
    "completed_at": None,
    "expires_at": None,
    "size": "96x96",
    "seconds": "2",
    "prompt": "a small red circle moving right on a black background",
    "error": None,
    "remixed_from_video_id": None,
    "mode": "w8a8",
    "negative_prompt": "",
    "seed": 7,
    "num_frames": 17,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "queue_position": None,
    "notes": [],
    "seconds_left": 4.2,
}


class VideoError(BaseModel):
    """The reason why there is no video."""

    code: str = Field(description="Stable; `cancelled` for a job that was cancelled.")
    message: str


class VideoObject(BaseModel):
    """The current state of a job. The keys from `mode` on are this service's own."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str
    object: Literal["video"] = "video"
    model: str = Field(description="MODEL:MODE; as `model`, it asks for the same again.")
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="0 to 100, and 100 only when completed.")
    created_at: int = Field(description="Unix seconds, as all times here.")
    completed_at: int | None = Field(description="When the job ended, whatever its end.")
    expires_at: int | None = Field(description="When the video, if there is one, is deleted.")
    size: str
    seconds: str | None = Field(
        description="How long the video lasts. Null while there is none, if no live worker has the "
        "model, whose frame rate decides."
    )
    prompt: str
    error: VideoError | None
    remixed_from_video_id: None = None
    mode: str
    negative_prompt: str
    seed: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    queue_position: int | None = Field(
        description="How many jobs run or wait before this one, if it waits."
    )
    notes: list[str] = Field(description="What of the request has no effect, and why.")
    seconds_left: float | None = Field(description="Until the job's end, as far as is known.")

    @classmethod
    def of(cls, job: JobRecord, video_status: VideoStatus) -> Self:
        """Build the video object of a job."""
        request, position = job.request, video_status.queue_position
        return cls(
            id=job.id,
            model=f"{request.model}:{request.mode}",
            status=_STATUS[job.state],
            progress=_percent(job),
            created_at=int(job.created_at.timestamp()),
            completed_at=_unix_second(job.finished_at),
            expires_at=_unix_second(video_status.expires_at),
            seconds=_duration(request.num_frames, video_status.fps),
            error=_error(job),
            queue_position=None if position is None else position.position,
            notes=notes_on(request),
            seconds_left=_rounded(video_status.seconds_left),
            **request.model_dump(exclude={"model"}),
        )


class VideoList(BaseModel):
    """A page of video objects."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None = Field(description="The id of the first; null for an empty page.")
    last_id: str | None = Field(description="Ask with it as `after` for the next page.")
    has_more: bool

    @classmethod
    def of(cls, data: list[VideoObject], *, has_more: bool) -> Self:
        """Build a page of these video objects."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)


class VideoDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def _percent(job: JobRecord) -> int:
    """Compute the progress in percent. It grows during an attempt, and each attempt begins at 0."""
    if job.state is JobState.SUCCEEDED:
        return 100
    if job.progress is None:
        return 0
    begin, end = _PERCENT[job.progress.stage]
    share = min(1, job.progress.step / job.progress.steps)
    return int(begin + share * (end - begin))


def _error(job: JobRecord) -> VideoError | None:
    if job.state is JobState.CANCELLED:
        return VideoError(code="cancelled", message="The job was cancelled.")
    if job.failure is None:
        return None
    return VideoError(code=job.failure.code, message=job.failure.detail)


def _unix_second(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _duration(num_frames: int, fps: int | None) -> str | None:
    return None if fps is None else f"{(num_frames - 1) / fps:g}"
