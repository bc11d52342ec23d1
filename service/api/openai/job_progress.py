"""What is known of a job beyond its record: its frame rate, place, seconds left, and time to go."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from redis.exceptions import RedisError

from jobs.durations import DurationCache
from jobs.record import JobRecord
from jobs.store.queue_positions import QueuePosition
from service.api.deps import AppState

logger = logging.getLogger(__name__)

MIN_POLL_MS: Final = 500
MAX_POLL_MS: Final = 5000
UNKNOWN_POLL_MS: Final = 1000
"""What OpenAI's clients do without being told."""
POLLS_LEFT: Final = 10
"""About so often a client asks until the end: it learns of it a tenth of the time late at most."""


@dataclass(frozen=True, slots=True)
class VideoStatus:
    """None for what is not known or does not apply. `seconds_left` are those until the end."""

    fps: int | None
    place: QueuePosition | None = None
    seconds_left: float | None = None
    expires_at: datetime | None = None

    @property
    def poll_after_ms(self) -> int:
        if self.seconds_left is None:
            return UNKNOWN_POLL_MS
        return min(MAX_POLL_MS, max(MIN_POLL_MS, round(self.seconds_left * 1000 / POLLS_LEFT)))


def outlooks(parts: AppState, jobs: Sequence[JobRecord]) -> dict[str, VideoStatus]:
    """Find the outlook of each job, by its id.

    Where Redis does not answer, an unfinished job has none: that is no reason to answer with an
    error, least of all when the job was just created.
    """
    found = {job.id: _of_video(parts, job) for job in jobs}
    unfinished = [job for job in jobs if job.video is None]
    if unfinished:
        try:
            found |= _of_unfinished(parts, unfinished)
        except RedisError as error:
            logger.warning("What jobs have before them cannot be read: %r", error)
    return found


def _of_video(parts: AppState, job: JobRecord) -> VideoStatus:
    if job.video is None:
        return VideoStatus(None)
    return VideoStatus(job.video.fps, expires_at=parts.settings.keep.video_until(job))


def _of_unfinished(parts: AppState, jobs: Sequence[JobRecord]) -> dict[str, VideoStatus]:
    fps = {offer.model.name: offer.model.fps for offer in parts.catalog.get().offers}
    places = parts.places.of(jobs)
    paces = DurationCache(parts.redis)
    found = {}
    for job in jobs:
        place = places.get(job.id)
        seconds_left = _seconds_left(job, place, paces)
        found[job.id] = VideoStatus(fps.get(job.request.model), place, seconds_left)
    return found


def _seconds_left(
    job: JobRecord, place: QueuePosition | None, paces: DurationCache
) -> float | None:
    if job.progress is not None:
        return job.progress.seconds_left
    if place is None or place.starts_in_s is None:
        return None
    pace = paces.of(job.request)
    return None if pace is None else place.starts_in_s + pace.job_s(job.request.num_inference_steps)
