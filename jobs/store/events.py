"""What happened to a job, in order: a Redis stream per job, written by the scripts.

An event's id is the stream's, so a reader that knows the last one it saw misses nothing, whichever
process it asks. Whoever follows jobs listens on `keys.EVENTS_CHANNEL`, which says no more than that
a job's stream has grown (or that the job was deleted), and reads the stream.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jobs import redis_keys
from jobs.record import Progress
from jobs.state import JobState

START = "0-0"
"""Before the first event."""

_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A change of state (or of the wish to cancel), or progress within the running state."""

    event_id: str
    kind: Literal["state", "progress"]
    state: JobState
    attempts: int
    at: datetime
    progress: Progress | None


def is_event_id(text: str) -> bool:
    """Whether `text` can be the id of an event, as a caller's Last-Event-ID has to be."""
    return _EVENT_ID.fullmatch(text) is not None


def range_after(job_id: str, event_id: str) -> tuple[str, Any, Any]:
    """The arguments of XRANGE for the events after `event_id`, for clients of either kind."""
    return redis_keys.events(job_id), f"({event_id}", "+"


def decode(entries: Any) -> list[JobEvent]:
    """Read what XRANGE answers: pairs of an id and the fields of an entry."""
    return [_event(event_id.decode(), fields) for event_id, fields in entries]


def _event(event_id: str, fields: dict[bytes, bytes]) -> JobEvent:
    progress = fields[b"progress"]
    kind: Any = fields[b"kind"].decode()
    return JobEvent(
        event_id=event_id,
        kind=kind,
        state=JobState(fields[b"state"].decode()),
        attempts=int(fields[b"attempts"]),
        at=datetime.fromisoformat(fields[b"at"].decode()),
        progress=Progress.model_validate_json(progress) if progress else None,
    )
