"""Logging of the worker process: one line per event on stderr, with the id of its job.

Configured once, by `main()`. Prompts are never logged: they belong to the callers.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

JOB_ID: ContextVar[str] = ContextVar("job_id", default="-")


class JobIdFilter(logging.Filter):
    """Gives every record the `job_id` of the context it was made in."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.job_id = JOB_ID.get()
        return True


def configure_logging() -> None:
    """Send INFO and above to stderr; of the libraries' own talk only warnings and errors."""
    handler = logging.StreamHandler()
    handler.addFilter(JobIdFilter())
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(job_id)s] %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("rq", "diffusers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
