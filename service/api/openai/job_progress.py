"""Look up what video objects show besides a job's record: position, seconds left, expiry."""

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
"""The default of OpenAI's clients."""
POLLS_LEFT: Final = 10
"""About how often a client polls until the job ends. So it notices the end late by at most a tenth
of the time that was left."""


@dataclass(frozen=True, slots=True)
class VideoStatus:
    """The frame rate, position, seconds until the end, and expiry of a job's video.

    None for a value that is unknown or does not apply.
    """

    fps: int | None
    queue_position: QueuePosition | None = None
    seconds_left: float | None = None
    expires_at: datetime | None = None

    @property
    def poll_after_ms(self) -> int:
        """After how many milliseconds the client should ask again."""
        if self.seconds_left is None:
            return UNKNOWN_POLL_MS
        return min(MAX_POLL_MS, max(MIN_POLL_MS, round(self.seconds_left * 1000 / POLLS_LEFT)))


def video_statuses(app_state: AppState, jobs: Sequence[JobRecord]) -> dict[str, VideoStatus]:
    """Look up the status of each job, by its id.

    If Redis does not answer, the values of jobs without a video are None. That is no reason to
    answer a request with an error, least of all when a job was just created.
    """
    found = {job.id: _with_video(app_state, job) for job in jobs}
    without_video = [job for job in jobs if job.video is None]
    if without_video:
        try:
            found |= _without_video(app_state, without_video)
        except RedisError as error:
            logger.warning("What jobs have before them cannot be read: %r", error)
    return found


def _with_video(app_state: AppState, job: JobRecord) -> VideoStatus:
    if job.video is None:
        return VideoStatus(None)
    expires_at = app_state.settings.retention_periods.video_until(job)
    return VideoStatus(job.video.fps, expires_at=expires_at)


def _without_video(app_state: AppState, jobs: Sequence[JobRecord]) -> dict[str, VideoStatus]:
    fps = {offer.model.name: offer.model.fps for offer in app_state.catalog.get().offers}
    positions = app_state.queue_positions.of(jobs)
    duration_cache = DurationCache(app_state.redis)
    found = {}
    for job in jobs:
        position = positions.get(job.id)
        seconds_left = _seconds_left(job, position, duration_cache)
        found[job.id] = VideoStatus(fps.get(job.request.model), position, seconds_left)
    return found


def _seconds_left(
    job: JobRecord, position: QueuePosition | None, duration_cache: DurationCache
) -> float | None:
    if job.progress is not None:
        return job.progress.seconds_left
    if position is None or position.starts_in_s is None:
        return None
    durations = duration_cache.of(job.request)
    if durations is None:
        return None
    return position.starts_in_s + durations.job_s(job.request.num_inference_steps)
