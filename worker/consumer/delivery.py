"""Read RQ's entry of a job, and accept only what the service writes: its task, with the job's id.

An entry of RQ names a function, and functions to call when it has succeeded or failed. RQ would
import and call whatever is named there. So anybody who can write into a queue could run any
function as the worker. Here an entry with another content is removed before anything of it is
imported, and the fields that the service does not write are not even read. Data is JSON, and never
unpickled.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from typing import Any, Final, cast

from redis import Redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job

from jobs.store.rq_entry import TASK

logger = logging.getLogger(__name__)

_READ: Final = frozenset(
    {
        *(b"data", b"origin", b"timeout", b"result_ttl", b"failure_ttl", b"status"),
        *(b"created_at", b"enqueued_at", b"started_at", b"ended_at", b"last_heartbeat"),
        b"worker_name",
    }
)
"""The fields that the service writes (`jobs/store/rq_entry.py`), and those of RQ's own bookkeeping.
Others name callbacks, webhooks, dependent jobs and repetitions."""

_LONGEST_DATA: Final = 1024
"""Bytes of data, unpacked; the task and an id are far fewer."""


class Delivery(Job):  # type: ignore[misc]  # rq is untyped to mypy here
    """RQ's entry of a job that the service has queued."""

    def restore(self, raw_data: Mapping[bytes, bytes]) -> Any:
        """Take over what Redis holds.

        Raises:
            NoSuchJobError: the service did not write this entry. It is removed; RQ goes on with the
                next. If its id is that of a waiting job, recovery writes a new one.
        """
        fault = _fault(self.id, raw_data.get(b"data"))
        try:
            if fault is None:
                return super().restore({k: v for k, v in raw_data.items() if k in _READ})
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            fault = f"a field of it cannot be read ({type(error).__name__})"
        logger.error("RQ's entry %.64r is removed and not run: %s", self.id, fault)
        _remove(self.connection, self.key, self.id)
        raise NoSuchJobError(f"RQ's entry {self.id} was refused.")


def _fault(job_id: str, data: bytes | None) -> str | None:
    """Return what is wrong with the data of an entry; None if it is what the service writes."""
    if data is None:
        return "it has no data"
    try:
        text = zlib.decompressobj().decompress(data, _LONGEST_DATA)
        found = json.loads(text)
    except (zlib.error, ValueError, RecursionError):
        return "its data is not the JSON of a job"
    if not isinstance(found, list) or len(found) != 4 or found[0] != TASK:
        return f"it does not name {TASK}, the only task of this worker"
    if found[1:] != [None, [job_id], {}]:
        return "its arguments are not the job's id"
    return None


def _remove(redis: Redis, key: str, job_id: str) -> None:
    with redis.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        for queue in cast("list[Queue]", Queue.all(connection=redis)):
            pipe.lrem(queue.intermediate_queue_key, 0, job_id)
        pipe.execute()
