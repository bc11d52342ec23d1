"""Make and check job ids, which sort by their time of creation.

An index of ids is therefore an index by time. Ids that one process makes sort in the order in which
it made them, also within a millisecond; those of several processes do by the millisecond.
"""

import re
import secrets
import threading
import time
from datetime import UTC, datetime

from jobs.errors import InvalidSpec, JobNotFound
from jobs.violations import shown

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TIMED_ID = re.compile(r"[0-9a-f]{32}")


_RANDOM_BITS = 80
_STEP_BITS = 64  # of a random step within a millisecond, so that no id tells its neighbours
_making = threading.Lock()
_last = ("", 0)  # the prefix and the random part of the last id


def new_id() -> tuple[str, datetime]:
    """Make an id (12 hex digits of milliseconds, then 80 random bits); return it and its time.

    Within a millisecond the random part of each id is larger than that of the one before (RFC 9562,
    monotonic random).
    """
    global _last  # noqa: PLW0603 (ids are made in order by the whole process)
    with _making:
        second = time.time()
        prefix, (last_prefix, last_random) = id_prefix(second), _last
        if prefix == last_prefix:
            random = last_random + 1 + secrets.randbits(_STEP_BITS)
        else:
            random = secrets.randbits(_RANDOM_BITS - 1)  # half of the range is left for steps
        _last = prefix, random
    return f"{prefix}{random:020x}", datetime.fromtimestamp(int(second * 1000) / 1000, UTC)


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
