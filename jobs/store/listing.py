"""List records in pages, past those that this version cannot read.

Such records are named in the log once, and skipped. A page without any readable record would look
like the last one to many clients, so the search goes on, many records in each round trip.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from redis import Redis

from jobs import ids, record, redis_keys
from jobs.errors import RecordUnreadable
from jobs.record import JobRecord

logger = logging.getLogger(__name__)

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
class Query:
    """An index, the order of its records, and how many make a page at most."""

    index: str
    limit: int
    oldest_first: bool


class Listing:
    """Reads pages of records. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._unreadable: dict[str, float] = {}  # with the time at which it is read again

    def page(self, query: Query, last_seen: str | None) -> JobPage:
        """Read the page after the id `last_seen`; the first one if that is None."""
        examined, size = 0, query.limit
        while True:
            names = self._names(query, last_seen, size + 1)
            here, more = names[:size], len(names) > size
            found = self._read(here)
            jobs = found[: query.limit]
            if jobs or not more or examined >= MOST_SKIPPED:
                break
            examined, size, last_seen = examined + size, SKIP_PAGE, here[-1]
        if len(found) > len(jobs):
            return JobPage(jobs, ids.cursor_after(jobs[-1].id))
        return JobPage(jobs, ids.cursor_after(here[-1]) if more else None)

    def _names(self, query: Query, last_seen: str | None, number: int) -> list[str]:
        after = None if last_seen is None else f"({last_seen}"
        if query.oldest_first:
            found = self._redis.zrangebylex(query.index, after or "-", "+", start=0, num=number)
        else:
            found = self._redis.zrevrangebylex(query.index, after or "+", "-", start=0, num=number)
        return [cast("bytes", each).decode() for each in found]

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
