"""The worker's log: the lines of `jobs/logs.py`, with the worker's id and that of its job."""

from __future__ import annotations

import logging
from contextvars import ContextVar

from redis.exceptions import RedisError

from jobs import logs
from jobs.logs import LogFormat

JOB_ID: ContextVar[str | None] = ContextVar("job_id", default=None)


class WorkerIds:
    """The ids of every line; `worker_id` is set once the worker has its name."""

    def __init__(self) -> None:
        self.worker_id: str | None = None

    def __call__(self) -> dict[str, str]:
        named = {"worker_id": self.worker_id, "job_id": JOB_ID.get()}
        return {name: text for name, text in named.items() if text is not None}


def configure_logging(log_format: LogFormat) -> WorkerIds:
    """Set the log up; of the libraries' own talk only warnings and errors are kept."""
    ids = WorkerIds()
    logs.configure(log_format, ids, quiet=("rq", "diffusers", "httpx"))
    logging.getLogger("rq.worker").addFilter(_is_no_outage)
    return ids


def _is_no_outage(record: logging.LogRecord) -> bool:
    """RQ speaks of a lost Redis at every try to reach it; the worker says it once itself."""
    error = record.exc_info[1] if record.exc_info else None
    said = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(each, RedisError) for each in (error, *said))
