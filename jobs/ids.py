"""Make and check job ids, which sort by their time of creation.

An index of ids is therefore an index by time.
"""

import re
import secrets
import time
from datetime import UTC, datetime

from jobs.errors import InvalidSpec, JobNotFound
from jobs.violations import shown

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TIMED_ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> tuple[str, datetime]:
    """Make an id (12 hex digits of milliseconds, then 80 random bits); return it and its time."""
    second = time.time()
    millisecond = int(second * 1000)
    return id_prefix(second) + secrets.token_hex(10), datetime.fromtimestamp(
        millisecond / 1000, UTC
    )


def id_prefix(second: float) -> str:
    """Return how every id of this millisecond begins; it sorts before all of them."""
    return f"{int(second * 1000):012x}"


def timestamp_of(job_id: str) -> float | None:
    """Return when an id was made, in Unix seconds; None for an id that `new_id` did not make."""
    return int(job_id[:12], 16) / 1000 if _TIMED_ID.fullmatch(job_id) else None


def is_id(text: str) -> bool:
    """Return whether a text can be a job id."""
    return _JOB_ID.fullmatch(text) is not None


def checked(job_id: str) -> str:
    """Return the id, once it is safe to put into a Redis key.

    Raises:
        JobNotFound: it cannot be the id of a job.
    """
    if not is_id(job_id):
        raise not_found(job_id)
    return job_id


def not_found(job_id: str) -> JobNotFound:
    """Build the error for an id without a record."""
    name = shown(job_id)
    return JobNotFound(
        f"There is no job {name}. Records are kept for 30 days after a job's creation, unless "
        f"they are deleted before.",
        job_id=name,
    )


def cursor_after(job_id: str) -> str:
    """Return the cursor of the page that starts after this id."""
    return f"c{job_id}"


def parse_cursor(cursor: str) -> str:
    """Return the id that a cursor was made from.

    Raises:
        InvalidSpec: it is not a cursor.
    """
    if not (cursor.startswith("c") and _JOB_ID.fullmatch(cursor[1:])):
        raise InvalidSpec.of(
            "cursor",
            shown(cursor),
            "the next_cursor of an earlier page",
            "cursor is not one this service has given; take next_cursor of the page before, or "
            "leave it out.",
        )
    return cursor[1:]
