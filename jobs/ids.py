"""Job ids: they sort by their time, so an index of ids is an index of time."""

import re
import secrets
import time
from datetime import UTC, datetime

from jobs.errors import InvalidSpec, JobNotFound
from jobs.spec import shown

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MADE_HERE = re.compile(r"[0-9a-f]{32}")


def new_id() -> tuple[str, datetime]:
    """Make an id, 12 hex digits of milliseconds and 80 random bits, and say which time it holds."""
    second = time.time()
    millisecond = int(second * 1000)
    return id_at(second) + secrets.token_hex(10), datetime.fromtimestamp(millisecond / 1000, UTC)


def id_at(second: float) -> str:
    """The beginning of every id of this second's millisecond; sorts before all of them."""
    return f"{int(second * 1000):012x}"


def second_of(job_id: str) -> float | None:
    """The second an id was made in; None for one that was not made here."""
    return int(job_id[:12], 16) / 1000 if _MADE_HERE.fullmatch(job_id) else None


def is_id(text: str) -> bool:
    return _JOB_ID.fullmatch(text) is not None


def checked(job_id: str) -> str:
    """Refuse what cannot be an id before it becomes part of a key. Raises JobNotFound."""
    if not is_id(job_id):
        raise not_found(job_id)
    return job_id


def not_found(job_id: str) -> JobNotFound:
    name = shown(job_id)
    return JobNotFound(
        f"There is no job {name}. Records are kept for 30 days after a job's creation, unless "
        f"they are deleted before.",
        job_id=name,
    )


def cursor_after(job_id: str) -> str:
    return f"c{job_id}"


def read_cursor(cursor: str) -> str:
    """The id a cursor stands for. Raises InvalidSpec."""
    if not (cursor.startswith("c") and _JOB_ID.fullmatch(cursor[1:])):
        raise InvalidSpec.of(
            "cursor",
            shown(cursor),
            "the next_cursor of an earlier page",
            "cursor is not one this service has given; take next_cursor of the page before, or "
            "leave it out.",
        )
    return cursor[1:]
