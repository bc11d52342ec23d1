"""What is known of a job beyond its record: its frame rate, its place, the seconds it has left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from jobs.pace import Paces
from jobs.places import Place
from jobs.record import JobRecord
from service.deps import Parts

MIN_POLL_MS: Final = 500
MAX_POLL_MS: Final = 5000
UNKNOWN_POLL_MS: Final = 1000
"""What OpenAI's clients do without being told."""
POLLS_LEFT: Final = 10
"""About so often a client asks until the end: it learns of it a tenth of the time late at most."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """`seconds_left` are those until the job's end. None for what is not known, or is over."""

    fps: int | None
    place: Place | None = None
    seconds_left: float | None = None

    @property
    def poll_after_ms(self) -> int:
        if self.seconds_left is None:
            return UNKNOWN_POLL_MS
        return min(MAX_POLL_MS, max(MIN_POLL_MS, round(self.seconds_left * 1000 / POLLS_LEFT)))


def outlooks(parts: Parts, jobs: Sequence[JobRecord]) -> dict[str, Outlook]:
    """Find the outlook of each job, by its id."""
    if all(job.video is not None for job in jobs):
        return {job.id: Outlook(job.video.fps) for job in jobs if job.video is not None}
    fps = {offer.model.name: offer.model.fps for offer in parts.catalog.get().offers}
    places = parts.places.of(jobs)
    paces = Paces(parts.redis)
    found = {}
    for job in jobs:
        rate = fps.get(job.request.model) if job.video is None else job.video.fps
        place = places.get(job.id)
        found[job.id] = Outlook(rate, place, _seconds_left(job, place, paces))
    return found


def _seconds_left(job: JobRecord, place: Place | None, paces: Paces) -> float | None:
    if job.progress is not None:
        return job.progress.seconds_left
    if place is None or place.starts_in_s is None:
        return None
    pace = paces.of(job.request)
    return None if pace is None else place.starts_in_s + pace.job_s(job.request.num_inference_steps)
