"""List jobs by state, owner, mode, group and time of creation, page by page.

The indexes are sorted by id, and so by time. Mode and group are looked up in the records.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, cast

from redis import Redis

from jobs import ids, record, redis_keys
from jobs.errors import InvalidSpec, RecordUnreadable
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.violations import outside

logger = logging.getLogger(__name__)

MAX_PAGE: Final = 200
"""The most records of one page."""
LIMIT_BOUND: Final = f"a whole number from 1 to {MAX_PAGE}"
BATCH: Final = 200
MAX_EXAMINED: Final = 2000
"""At most so many jobs are looked at for a page of one mode or group; the page may be short then,
and still have a cursor."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """Records sorted by creation, in either order; `next_cursor` is None on the last page."""

    jobs: tuple[JobRecord, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which jobs to list; None for all.

    Attributes:
        owner: whose jobs.
        group: the group that one request with a `count` made.
        created_after: created at this time or later.
        created_before: created before this time.
    """

    state: JobState | None = None
    owner: str | None = None
    mode: str | None = None
    group: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    @property
    def index(self) -> str:
        """The Redis key of the index to read."""
        return redis_keys.index("all" if self.state is None else self.state.value, self.owner)


def read_page(
    redis: Redis, wanted: Wanted, limit: int, cursor: str | None, *, oldest_first: bool
) -> JobPage:
    """Read up to `limit` records; see `JobStore.list`."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidSpec([outside("limit", limit, LIMIT_BOUND)])
    last = None if cursor is None else ids.parse_cursor(cursor)
    is_filtering = wanted.mode is not None or wanted.group is not None
    size = BATCH if is_filtering else limit + 1
    found: list[str] = []
    for _ in range(0, MAX_EXAMINED, size):
        names = _names(redis, wanted, last, size, oldest_first=oldest_first)
        matching = _matching(redis, names, wanted) if is_filtering else set(names)
        for name in names:
            if len(found) == limit:
                return JobPage(_read_all(redis, found), ids.cursor_after(found[-1]))
            if name in matching:
                found.append(name)
        if len(names) < size:
            return JobPage(_read_all(redis, found), None)
        last = names[-1]
    return JobPage(_read_all(redis, found), None if last is None else ids.cursor_after(last))


def _names(
    redis: Redis, wanted: Wanted, last: str | None, size: int, *, oldest_first: bool
) -> list[str]:
    """Read the next ids after `last`, in the order of the list."""
    after, before = wanted.created_after, wanted.created_before
    least = "-" if after is None else f"[{ids.id_prefix(after.timestamp())}"
    most = "+" if before is None else f"({ids.id_prefix(before.timestamp())}"
    if last is not None and oldest_first:
        least = f"({last}" if least == "-" else max(f"({last}", least, key=lambda each: each[1:])
    elif last is not None:
        most = f"({last}" if most == "+" else min(f"({last}", most, key=lambda each: each[1:])
    if oldest_first:
        found = redis.zrangebylex(wanted.index, least, most, start=0, num=size)
    else:
        found = redis.zrevrangebylex(wanted.index, most, least, start=0, num=size)
    return [cast("bytes", each).decode() for each in found]


def _matching(redis: Redis, names: Sequence[str], wanted: Wanted) -> set[str]:
    """Return the ids of the jobs of the wanted mode and group."""
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hmget(redis_keys.record(name), ["shape", "group"])
        fields: Sequence[tuple[bytes | None, bytes | None]] = pipe.execute()
    return {
        name
        for name, (shape, group) in zip(names, fields, strict=True)
        if (wanted.mode is None or _mode_of(shape) == wanted.mode)
        and (wanted.group is None or (group or b"").decode() == wanted.group)
    }


def _mode_of(shape: bytes | None) -> str | None:
    """Return the mode in a shape, `model|mode|...`."""
    return None if shape is None else shape.decode().split("|")[1]


def _read_all(redis: Redis, names: Sequence[str]) -> tuple[JobRecord, ...]:
    with redis.pipeline(transaction=False) as pipe:
        for job_id in names:
            pipe.hgetall(redis_keys.record(job_id))
        found: Sequence[dict[bytes, bytes]] = pipe.execute()
    jobs = []
    for job_id, fields in zip(names, found, strict=True):
        # A record may expire before its index entry is removed.
        if not fields or b"delete_requested" in fields:
            continue
        try:
            jobs.append(record.decode(job_id, fields))
        except RecordUnreadable as error:
            logger.error("Left out of a list: %s", error)
    return tuple(jobs)
