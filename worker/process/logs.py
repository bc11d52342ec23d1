"""Configure the worker's log: lines as in `jobs/telemetry/logs.py`, with ids of worker and job."""

from __future__ import annotations

import logging

from redis.exceptions import RedisError

from jobs.telemetry import logs, tracing
from jobs.telemetry.logs import LogFormat
from worker.interface import JOB_ID


class WorkerIds:
    """The ids that every log line carries; `worker_id` is set once the worker has a name."""

    def __init__(self) -> None:
        self.worker_id: str | None = None

    def __call__(self) -> dict[str, str]:
        ids = {"worker_id": self.worker_id, "job_id": JOB_ID.get()}
        found = {name: text for name, text in ids.items() if text is not None}
        return found | tracing.log_ids()


def configure_logging(log_format: LogFormat) -> WorkerIds:
    """Configure logging; of libraries such as RQ, keep only warnings and errors."""
    ids = WorkerIds()
    logs.configure(log_format, ids, quiet=("rq", "diffusers", "httpx"))
    logging.getLogger("rq.worker").addFilter(_is_no_outage)
    return ids


def _is_no_outage(record: logging.LogRecord) -> bool:
    """Drop RQ's message at each failed connection attempt; the worker logs an outage once."""
    error = record.exc_info[1] if record.exc_info else None
    args = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(each, RedisError) for each in (error, *args))
