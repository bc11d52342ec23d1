"""Read the events of a job, which the Lua scripts append to one Redis stream per job.

An event's id is its id in the stream, so a reader that knows the last id it saw misses nothing,
whichever service process it connects to. Readers subscribe to `redis_keys.EVENTS_CHANNEL`, which
only announces that a job's stream has grown (or that the job was deleted), and then read the
stream.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jobs import redis_keys
from jobs.record import Progress
from jobs.state import JobState

EVENT_ID_PATTERN = r"^[0-9]{1,19}-[0-9]{1,19}$"
START = "0-0"
"""The event id that comes before the first event."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A change of the state, a request to cancel, progress within the running state, or a preview.

    `preview` is the number of the job's newest preview; None if there is none.
    """

    event_id: str
    kind: Literal["state", "progress", "preview"]
    state: JobState
    attempts: int
    at: datetime
    progress: Progress | None
    preview: int | None = None


def range_after(job_id: str, event_id: str) -> tuple[str, Any, Any]:
    """Return the arguments of XRANGE for the events after `event_id`."""
    return redis_keys.events(job_id), f"({event_id}", "+"


def decode(entries: Any) -> list[JobEvent]:
    """Convert the response of XRANGE: pairs of an id and the fields of an entry."""
    return [_event(event_id.decode(), fields) for event_id, fields in entries]


def _event(event_id: str, fields: dict[bytes, bytes]) -> JobEvent:
    progress = fields[b"progress"]
    preview = fields.get(b"preview")  # earlier versions wrote none
    kind: Any = fields[b"kind"].decode()
    return JobEvent(
        event_id=event_id,
        kind=kind,
        state=JobState(fields[b"state"].decode()),
        attempts=int(fields[b"attempts"]),
        at=datetime.fromisoformat(fields[b"at"].decode()),
        progress=Progress.model_validate_json(progress, extra="ignore") if progress else None,
        preview=int(preview) if preview else None,
    )
