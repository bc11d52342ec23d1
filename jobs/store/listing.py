"""List jobs by state, owner, mode, group and time of creation, page by page.

The indexes are sorted by id, and so by time. Mode and group are looked up in the records. Records
that this version cannot read are named in the log once, and skipped. A page without any readable
record would look like the last one to many clients, so the search goes on, many records in each
round trip.
"""

import logging
import time
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
"""At most so many jobs are looked at for a page of one mode or group, `BATCH` at a time; the page
may be short then, and still have a cursor."""

SKIP_PAGE: Final = 1000
"""So many records are read at once after a page without a readable one."""

MOST_SKIPPED: Final = 10_000
"""After about so many records the search ends with an empty page, which has a cursor."""

SKIPPED_S: Final = 60.0
"""An unreadable record is not read again for this long: it may be one of thousands that lie before
the readable ones in every list, and few are repaired by hand."""

_MOST_KNOWN: Final = 20_000


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

    @property
    def is_filtering(self) -> bool:
        """Whether the index has jobs that are not wanted."""
        return self.mode is not None or self.group is not None


class Listing:
    """Reads pages of records. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._unreadable: dict[str, float] = {}  # with the time at which it is read again

    def page(
        self, wanted: Wanted, limit: int, cursor: str | None, *, oldest_first: bool
    ) -> JobPage:
        """Read up to `limit` records; see `JobStore.list`."""
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidSpec([outside("limit", limit, LIMIT_BOUND)])
        last = None if cursor is None else ids.parse_cursor(cursor)
        size, next_size, most = limit, SKIP_PAGE, MOST_SKIPPED
        if wanted.is_filtering:
            size, next_size, most = BATCH, BATCH, MAX_EXAMINED
        jobs: tuple[JobRecord, ...] = ()
        examined = 0
        while True:
            names = self._names(wanted, last, size + 1, oldest_first=oldest_first)
            here, more = names[:size], len(names) > size
            if wanted.is_filtering:
                # More at a time the longer it takes: most of them may be unreadable.
                matching = self._matching(here, wanted)
                read = matching[: max(limit + 1 - len(jobs), examined)]
                if len(read) < len(matching):
                    here, more = here[: here.index(read[-1]) + 1], True
            else:
                read = here
            jobs += self._read(read)
            if len(jobs) > limit:
                return JobPage(jobs[:limit], ids.cursor_after(jobs[limit - 1].id))
            if not more:
                return JobPage(jobs, None)
            examined, size, last = examined + len(here), next_size, here[-1]
            if examined >= most or (jobs and not wanted.is_filtering):
                return JobPage(jobs, ids.cursor_after(last))

    def _names(
        self, wanted: Wanted, last: str | None, number: int, *, oldest_first: bool
    ) -> list[str]:
        """Read the next ids after `last`, in the order of the list."""
        after, before = wanted.created_after, wanted.created_before
        least = "-" if after is None else f"[{ids.id_prefix(after.timestamp())}"
        most = "+" if before is None else f"({ids.id_prefix(before.timestamp())}"
        if last is not None and oldest_first:
            seen = f"({last}"
            least = seen if least == "-" else max(seen, least, key=lambda each: each[1:])
        elif last is not None:
            seen = f"({last}"
            most = seen if most == "+" else min(seen, most, key=lambda each: each[1:])
        if oldest_first:
            found = self._redis.zrangebylex(wanted.index, least, most, start=0, num=number)
        else:
            found = self._redis.zrevrangebylex(wanted.index, most, least, start=0, num=number)
        return [cast("bytes", each).decode() for each in found]

    def _matching(self, names: Sequence[str], wanted: Wanted) -> list[str]:
        """Return the ids of the jobs of the wanted mode and group."""
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(redis_keys.record(name), ["shape", "group"])
            fields: Sequence[tuple[bytes | None, bytes | None]] = pipe.execute()
        return [
            name
            for name, (shape, group) in zip(names, fields, strict=True)
            if (wanted.mode is None or _mode_of(shape) == wanted.mode)
            and (wanted.group is None or (group or b"").decode(errors="replace") == wanted.group)
        ]

    def _read(self, names: Sequence[str]) -> tuple[JobRecord, ...]:
        now = time.monotonic()
        wanted = [name for name in names if self._unreadable.get(name, now) <= now]
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in wanted:
                pipe.hgetall(redis_keys.record(job_id))
            found: Sequence[dict[bytes, bytes]] = pipe.execute()
        jobs, unreadable = [], []
        for job_id, fields in zip(wanted, found, strict=True):
            # A record may expire before its index entry is removed.
            if not fields or b"delete_requested" in fields:
                continue
            try:
                jobs.append(record.decode(job_id, fields))
            except RecordUnreadable as error:
                unreadable.append((job_id, error))
        if unreadable:
            self._leave_out(unreadable, now)
        return tuple(jobs)

    def _leave_out(self, unreadable: Sequence[tuple[str, RecordUnreadable]], now: float) -> None:
        """Skip these records for a while, and log those that were not logged before."""
        new = [(job_id, error) for job_id, error in unreadable if job_id not in self._unreadable]
        if len(self._unreadable) + len(new) > _MOST_KNOWN:
            self._unreadable.clear()
        self._unreadable.update((job_id, now + SKIPPED_S) for job_id, _ in unreadable)
        if new:
            others = ", ".join(job_id for job_id, _ in new[1:10])
            logger.error(
                "Left out of a list: %s Records left out for the first time: %d%s",
                new[0][1],
                len(new),
                f"; others are {others}" if others else "",
            )


def _mode_of(shape: bytes | None) -> str | None:
    """Return the mode in a shape, `model|mode|...`; None for one of another form."""
    return None if shape is None else [*shape.decode(errors="replace").split("|"), ""][1]
