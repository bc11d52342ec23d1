"""Define the record of a job, and convert it to and from its Redis hash.

Scalars are stored as plain text, so that the Lua scripts can compare them. Nested values are stored
as JSON. Fields that are not described here are ignored, and kept by every writer: those of later
versions, and these, which only the scripts use:

- `token`: of the attempt that owns the job;
- `lease_ms`: when, on Redis' clock, its lease expires unless it is renewed;
- `created_ms`, `started_ms`: times on Redis' clock;
- `missing_ms`: when the job, though queued, was first seen in no queue;
- `previews`: how many previews the job has had, in all attempts;
- `shape`, `steps`, `delete_requested`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs import durations, redis_keys
from jobs.errors import RecordUnreadable
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.telemetry.tracing import TraceContext


class Stage(StrEnum):
    """The stages of an attempt, in their order."""

    TEXT_ENCODER = "text_encoder"
    DENOISE = "denoise"
    VAE = "vae"
    MP4 = "mp4"


class _Part(BaseModel):
    # Values may be prompts, which must not be logged.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Progress(_Part):
    """The progress of a running job: `step` of `steps` done within `stage`.

    `seconds_left`, until the job's end, is None if no job of its shape was ever measured.
    """

    stage: Stage
    step: int = Field(ge=0)
    steps: int = Field(ge=1)
    seconds_left: float | None = Field(default=None, ge=0)


class Failure(_Part):
    """The reason why a job failed: an error's code and detail sentence, never a traceback."""

    code: str
    detail: str


class Picture(_Part):
    """A picture of the video: the artifact's key and a description of the file."""

    key: str
    bytes: int = Field(ge=1)
    sha256: str
    width: int
    height: int


class Spritesheet(Picture):
    """A picture with small frames in a grid; `frames` are their numbers, from 0, row by row."""

    columns: int
    rows: int
    frame_width: int
    frame_height: int
    frames: tuple[int, ...]


class Video(_Part):
    """The result: the artifact's key and a description of the file.

    The pictures are None where they could not be made, and in records of before they were.
    `frames_sha256` is the hash of the frames before the encoding (docs/api.md); None in records of
    before it was computed.
    """

    key: str
    bytes: int = Field(ge=1)
    sha256: str
    frames_sha256: str | None = None
    width: int
    height: int
    num_frames: int
    fps: int
    thumbnail: Picture | None = None
    spritesheet: Spritesheet | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the video and its pictures."""
        files = (self, self.thumbnail, self.spritesheet)
        return tuple(file.key for file in files if file is not None)


class StageTimings(_Part):
    """Seconds per stage; `queue_s` is from creation to claim, `total_s` from claim to end."""

    queue_s: float
    text_encoder_s: float
    denoise_s: float
    vae_s: float
    mp4_s: float
    total_s: float


class JobRecord(_Part):
    """The current state of one job.

    Attributes:
        owner: the name of the API key that created it.
        deadline_s: how many seconds an attempt may take; fixed when the job is created.
        started_at: the start of the latest attempt; None again after an attempt that ended without
            ending the job.
        metadata: the caller's own notes, by name.
        group: the group of the jobs of one request with a `count`: the id of the first.
        worker: the id of the worker that runs the latest attempt.
        attempts: how often a worker has started the job.
        lost: how many of these attempts were lost with their worker.
        preview: the number of the running attempt's newest preview; None while there is none.
        video_deleted_at: when the video was deleted by retention; `video` still describes it.
        traceparent, tracestate: the span that created the job, for a service that traces.
    """

    id: str
    state: JobState
    request: GenerationRequest
    queue: str
    owner: str
    priority: bool = False
    webhook_url: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    group: str | None = None
    deadline_s: int = Field(ge=1)
    created_at: AwareDatetime
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None
    worker: str | None = None
    attempts: int = 0
    lost: int = 0
    cancel_requested: bool = False
    progress: Progress | None = None
    preview: int | None = None
    failure: Failure | None = None
    video: Video | None = None
    video_deleted_at: AwareDatetime | None = None
    timings: StageTimings | None = None
    traceparent: str | None = None
    tracestate: str | None = None

    @property
    def trace(self) -> TraceContext | None:
        """The span that created the job, to continue its trace."""
        if self.traceparent is None:
            return None
        return TraceContext(self.traceparent, self.tracestate or "")


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to write to a job, from its `number`-th claim and proven by `token`."""

    job_id: str
    number: int
    token: str

    @property
    def label(self) -> str:
        """The number and the start of the token, to name artifacts.

        The number alone is not unique: a Redis that lost its latest writes counts again.
        """
        return f"{self.number}-{self.token[:8]}"


_NESTED = frozenset({"request", "metadata", "progress", "failure", "video", "timings"})
_NAMES = {name: name.encode() for name in JobRecord.model_fields}


def now() -> datetime:
    """Return the current time, in UTC."""
    return datetime.now(UTC)


def encode_new(record: JobRecord) -> dict[str, str]:
    """Convert a newly created, queued record to hash fields."""
    fields = {
        "id": record.id,
        "state": record.state.value,
        "request": record.request.model_dump_json(),
        "queue": record.queue,
        "owner": record.owner,
        "priority": str(int(record.priority)),
        "deadline_s": str(record.deadline_s),
        "created_at": record.created_at.isoformat(),
        "attempts": "0",
        "lost": "0",
        "cancel_requested": "0",
        "shape": durations.shape(record.request),
        "steps": str(record.request.num_inference_steps),
    }
    if record.webhook_url is not None:
        fields["webhook_url"] = record.webhook_url
    if record.metadata:
        fields["metadata"] = json.dumps(record.metadata)
    if record.group is not None:
        fields["group"] = record.group
    if record.traceparent is not None:
        fields["traceparent"] = record.traceparent
    if record.tracestate:
        fields["tracestate"] = record.tracestate
    return fields


def decode(job_id: str, fields: Mapping[bytes, bytes]) -> JobRecord:
    """Convert hash fields to a record.

    Raises:
        RecordUnreadable: a field is missing or not what this version writes, or the record has
            another format; the error names it.
    """
    written = fields.get(b"format")
    if written is not None and written != b"%d" % redis_keys.FORMAT:
        raise other_format(job_id, written.decode(errors="replace"), fields.get(b"owner", b""))
    try:
        texts = {
            name: value.decode()
            for name, key in _NAMES.items()
            if (value := fields.get(key)) is not None
        }
        return JobRecord.model_validate(
            {name: json.loads(text) if name in _NESTED else text for name, text in texts.items()},
            extra="ignore",
        )
    except ValueError as error:  # undecodable bytes, no JSON, or not a record
        raise RecordUnreadable(
            f"The record of job {job_id} cannot be read: {_reason(error)}. It was written by "
            f"another version or by hand; delete it, or run the version that wrote it.",
            job_id=job_id,
            owner=fields.get(b"owner", b"").decode(errors="replace"),
        ) from error


def other_format(job_id: str, written: str, owner: bytes = b"") -> RecordUnreadable:
    """Build the error for a record of a format that this version does not read."""
    return RecordUnreadable(
        f"The record of job {job_id} has the format {written[:20]!r}, and this version reads "
        f"{redis_keys.FORMAT}; run the version that wrote it.",
        job_id=job_id,
        owner=owner.decode(errors="replace"),
    )


def _reason(error: ValueError) -> str:
    """Describe the error without showing values, which may be prompts."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}"
        for each in error.errors(include_input=False, include_url=False)
    )
