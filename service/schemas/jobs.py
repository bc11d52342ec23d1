"""Define the JSON of jobs and models that callers see.

It contains no queue names, artifact keys or attempt tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from jobs.catalog import MIN_GUIDANCE_SCALE, Catalog, ModelOffer, ModeOffer
from jobs.record import Failure, JobRecord, Progress, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import Created
from jobs.store.queue_positions import QueuePosition
from jobs.store.webhook_outbox import Outbox, WebhookStatus
from service.lookups.queue_positions import CachedQueuePositions
from service.schemas.video_url import VideoFile, VideoLinks

_URL: Final = "http://127.0.0.1:8000/jobs/01a2039b8ee84d074d36452736a1b6c7"
_JOB_EXAMPLE: dict[str, Any] = {
    "id": "01a2039b8ee84d074d36452736a1b6c7",
    "state": "succeeded",
    "owner": "alice",
    "priority": False,
    "request": {
        "prompt": "a small red circle moving right on a black background",
        "negative_prompt": "",
        "mode": "w8a8",
        "size": "96x96",
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "seed": 7,
        "model": "wan-mini",
    },
    "created_at": "2026-11-22T14:14:16.040Z",
    "started_at": "2026-11-22T14:14:16.052Z",
    "finished_at": "2026-11-22T14:14:23.410Z",
    "attempts": 1,
    "lost": 0,
    "deadline_s": 825,
    "cancel_requested": False,
    "queue": None,
    "progress": None,
    "preview_url": None,
    "failure": None,
    "video": {
        "url": f"{_URL}/video.mp4"
        "?expires=1795360500&signature=0b9c1f6c0d4e8f2a7b5d3c1e9f8a6b4c2d0e1f3a5b7c9d8e6f4a2b0c1d3e5f7a",
        "bytes": 18231,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "frames_sha256": "d2a84f4b8b650937ec8f73cd8be2c74add5a911ba64df27458ed8229da804a26",
        "width": 96,
        "height": 96,
        "num_frames": 17,
        "fps": 8,
        "thumbnail_url": f"{_URL}/thumbnail.webp"
        "?expires=1795360500&signature=5d41402abc4b2a76b9719d911017c592ae3f0c8b1d7e6f5a4c3b2a190817e6d5",
        "spritesheet": {
            "url": f"{_URL}/spritesheet.webp"
            "?expires=1795360500&signature=7c6a180b36896a0a8c02787eeafb0e4c1f2e3d4c5b6a79880716253443526170",
            "columns": 5,
            "rows": 4,
            "frame_width": 96,
            "frame_height": 96,
            "count": 17,
            "frames": list(range(17)),
        },
        "expires_at": "2026-11-29T14:14:23.410Z",
        "deleted_at": None,
    },
    "timings": {
        "queue_s": 0.012,
        "text_encoder_s": 0.05,
        "denoise_s": 6.6,
        "vae_s": 0.6,
        "mp4_s": 0.1,
        "total_s": 7.36,
    },
    "metadata": {},
    "group": None,
    "notes": [],
    "webhook": None,
}

QUEUED_EXAMPLE: dict[str, Any] = {
    **_JOB_EXAMPLE,
    **dict.fromkeys(("started_at", "finished_at", "video", "timings")),
    "state": "queued",
    "attempts": 0,
    "queue": {"position": 2, "starts_in_s": 14.5},
}


class SpritesheetView(BaseModel):
    """A WebP with frames of the video in a grid; the cells after the last frame are transparent."""

    url: str = Field(description="Like the video's; answers 410 when the video's does.")
    columns: int
    rows: int
    frame_width: int = Field(description="Of each cell, in pixels.")
    frame_height: int
    count: int = Field(description="How many cells hold a frame, row by row.")
    frames: tuple[int, ...] = Field(
        description="The numbers of these frames in the video, from 0: the first, the last, and "
        "evenly spaced ones between. A frame begins at its number / fps seconds."
    )


class VideoView(BaseModel):
    """A finished video."""

    url: str = Field(
        description="Absolute, honours Range, and opens the video without a key until it expires."
    )
    bytes: int
    sha256: str = Field(description="Of the file.")
    frames_sha256: str | None = Field(
        description="SHA-256 of the line `rgb24 FRAMES HEIGHT WIDTH` with a line feed, then of all "
        "RGB24 bytes of the frames before the encoding. Null for older videos."
    )
    width: int
    height: int
    num_frames: int
    fps: int
    thumbnail_url: str | None = Field(
        description="A WebP of the middle frame, at most 320 px wide and high; like `url`. Null if "
        "none could be made."
    )
    spritesheet: SpritesheetView | None = Field(description="Null if none could be made.")
    expires_at: datetime = Field(description="Until when it is kept; then the URL answers 410.")
    deleted_at: datetime | None = Field(description="When it was deleted, once it was.")

    @classmethod
    def of(cls, job: JobRecord, video: Video, links: VideoLinks) -> Self:
        """Build the view of a job's video."""
        thumbnail_url = spritesheet = None
        if video.thumbnail is not None:
            thumbnail_url = links.to(job.id, VideoFile.THUMBNAIL)
        if video.spritesheet is not None:
            layout = video.spritesheet.model_dump(
                include={"columns", "rows", "frame_width", "frame_height", "frames"}
            )
            url = links.to(job.id, VideoFile.SPRITESHEET)
            spritesheet = SpritesheetView(url=url, count=len(video.spritesheet.frames), **layout)
        return cls(
            url=links.to(job.id),
            thumbnail_url=thumbnail_url,
            spritesheet=spritesheet,
            expires_at=links.retention_periods.video_until(job),
            deleted_at=job.video_deleted_at,
            **video.model_dump(exclude={"key", "thumbnail", "spritesheet"}),
        )


class WebhookView(WebhookStatus):
    """The status of the calls of a job's webhook; `last_…` are about the latest try."""

    url: str


class QueueView(BaseModel):
    """The position of a queued job."""

    position: int = Field(description="How many jobs of its queue run or wait before it.")
    starts_in_s: float | None = Field(
        description="An estimate from measured jobs; null where none like those before it was "
        "measured yet."
    )

    @classmethod
    def of(cls, queue_position: QueuePosition) -> Self:
        """Build the view of a position."""
        seconds = queue_position.starts_in_s
        return cls(
            position=queue_position.position,
            starts_in_s=None if seconds is None else round(seconds, 1),
        )


class JobView(BaseModel):
    """The current state of a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [_JOB_EXAMPLE]})

    id: str
    state: JobState
    owner: str = Field(description="The name of the key that requested it; local without keys.")
    priority: bool = Field(description="Whether it runs before all jobs without priority.")
    request: GenerationRequest = Field(description="What is run, with every default filled in.")
    created_at: datetime
    started_at: datetime | None = Field(description="When the latest attempt began.")
    finished_at: datetime | None
    attempts: int = Field(description="How often a worker has begun the job.")
    lost: int = Field(description="How many of these attempts vanished with their worker.")
    deadline_s: int = Field(description="The most seconds an attempt may take.")
    cancel_requested: bool
    queue: QueueView | None = Field(description="The position of a queued job.")
    progress: Progress | None = Field(description="The progress of a running job.")
    preview_url: str | None = Field(
        description="Of a running job: an animated WebP of at most 20 kB, made from what the model "
        "predicts so far. Each new one has another URL. Null while there is none."
    )
    failure: Failure | None = Field(description="Why the job failed, if it did.")
    video: VideoView | None = Field(description="The result, once the job has succeeded.")
    timings: StageTimings | None
    metadata: dict[str, str] = Field(description="As the request gave it.")
    group: str | None = Field(description="Of the jobs of one request with a `count`.")
    notes: list[str] = Field(description="What of the request has no effect, and why.")
    webhook: WebhookView | None = Field(
        description="The webhook to call at the end, if one was given."
    )

    @classmethod
    def of(
        cls,
        job: JobRecord,
        links: VideoLinks,
        status: WebhookStatus | None,
        queue_position: QueuePosition | None = None,
    ) -> Self:
        """Build the view of a job.

        Args:
            job: its record.
            links: makes the URLs of its video and pictures.
            status: the status of its webhook, from the outbox.
            queue_position: its position, if it is queued.
        """
        video = None if job.video is None else VideoView.of(job, job.video, links)
        webhook = None
        if job.webhook_url is not None and status is not None:
            webhook = WebhookView(url=job.webhook_url, **status.model_dump())
        queue = None if queue_position is None else QueueView.of(queue_position)
        notes = notes_on(job.request)
        derived: dict[str, Any] = {
            "video": video,
            "webhook": webhook,
            "queue": queue,
            "preview_url": None if job.preview is None else links.to_preview(job.id, job.preview),
            "notes": notes,
        }
        if job.timings is not None:
            seconds = job.timings.model_dump().items()
            derived["timings"] = StageTimings(**{name: round(each, 3) for name, each in seconds})
        copied = {name: getattr(job, name) for name in cls.model_fields if name not in derived}
        return cls(**derived, **copied)


def notes_on(request: GenerationRequest) -> list[str]:
    """Say which settings of a request have no effect."""
    if request.guidance_scale <= MIN_GUIDANCE_SCALE and request.negative_prompt:
        return ["negative_prompt has no effect, because guidance_scale 1 switches guidance off."]
    return []


class JobGroupView(BaseModel):
    """The jobs of one request with a `count`."""

    group: str = Field(description="Each of the jobs has it; `GET /jobs?group=` lists them.")
    jobs: list[JobView] = Field(description="In the order of their seeds.")


class EventView(BaseModel):
    """An event of a job: a change of its state, a request to cancel it, progress, or a preview."""

    id: str = Field(description="The job's.")
    state: JobState
    attempts: int
    at: datetime
    progress: Progress | None
    preview: int | None = Field(
        default=None,
        description="The number of a new preview, which `GET /jobs/{id}/preview.webp` sends; only "
        "with preview.",
    )
    job: JobView | None = Field(
        default=None, description="The whole job; only with the last event, which ends the job."
    )


@dataclass(frozen=True, slots=True)
class JobViews:
    """Builds the views of jobs for one caller."""

    links: VideoLinks
    outbox: Outbox
    queue_positions: CachedQueuePositions

    def of(self, job: JobRecord) -> JobView:
        """Build the view of one job."""
        return self.all([job])[0]

    def created(self, created: Created) -> JobView:
        """Build the view of a job that was just created; its position is known already."""
        job = created.job
        if created.position is None:
            return self.of(job)
        (status,) = self.outbox.statuses([job])
        queue_position = self.queue_positions.at(job.queue, created.position)
        return JobView.of(job, self.links, status, queue_position)

    def group(self, created: Created) -> JobGroupView:
        """Build the view of all jobs of a request."""
        jobs = [created.job, *created.others]
        return JobGroupView(group=created.job.group or created.job.id, jobs=self.all(jobs))

    def all(self, jobs: Sequence[JobRecord]) -> list[JobView]:
        """Build the views of many jobs, with few round trips to Redis."""
        positions = self.queue_positions.of(jobs)
        statuses = self.outbox.statuses(jobs)
        return [
            JobView.of(job, self.links, status, positions.get(job.id))
            for job, status in zip(jobs, statuses, strict=True)
        ]


class JobListView(BaseModel):
    """Jobs, newest first."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"jobs": [_JOB_EXAMPLE], "next_cursor": None}]}
    )

    jobs: list[JobView]
    next_cursor: str | None = Field(description="Ask with it for the next page; null on the last.")


class ServedModeView(ModeOffer):
    """A mode with its bounds and defaults, and how many live workers serve it."""

    min_steps: int = Field(description="Of `num_inference_steps`, as the next two.")
    max_steps: int
    default_steps: int
    max_guidance_scale: float = Field(
        description="1: without guidance, so that a negative prompt has no effect."
    )
    default_guidance_scale: float
    workers: int


class WorkerView(BaseModel):
    """A live worker that serves the model."""

    id: str
    device: str
    modes: list[str]
    started_at: datetime


class ModelView(ModelOffer):
    """A model's bounds and defaults, its modes, and the workers that serve it."""

    modes: list[ServedModeView]
    workers: list[WorkerView]


class ModelListView(BaseModel):
    """The models that live workers offer; empty if none is live."""

    models: list[ModelView]

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """Build the view of all live offers, sorted by model."""
        models = sorted({offer.model for offer in catalog.offers}, key=lambda m: m.name)
        return cls(models=[_model_view(model, catalog) for model in models])


def _model_view(model: ModelOffer, catalog: Catalog) -> ModelView:
    offers = [offer for offer in catalog.offers if offer.model == model]
    modes = sorted({mode for offer in offers for mode in offer.modes}, key=lambda m: m.name)
    workers = {mode: sum(mode in offer.modes for offer in offers) for mode in modes}
    terms = {mode: asdict(model.terms(mode)) for mode in modes}
    return ModelView(
        **model.model_dump(),
        modes=[
            ServedModeView(**mode.model_dump() | terms[mode], workers=workers[mode])
            for mode in modes
        ],
        workers=[
            WorkerView(
                id=offer.worker_id,
                device=offer.device,
                modes=[mode.name for mode in offer.modes],
                started_at=offer.started_at,
            )
            for offer in offers
        ],
    )
