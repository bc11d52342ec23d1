"""Describe the conditions of one submission: owner, priority, webhook, idempotency and limits."""

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from jobs.errors import IdempotencyConflict, QueueFull, QuotaExceeded, TooManyRequests

OPEN_OWNER = "local"
"""The owner of all jobs in a service that requires no API keys."""

RETRY_AFTER_S: Final = 10
"""The Retry-After of a refusal because of too many jobs: about the duration of a short one."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's Idempotency-Key: the same key and body refer to the same job."""

    key: str
    body_sha256: str

    @classmethod
    def of(cls, key: str, body: object) -> "Idempotency":
        """Build it from the parsed JSON; the order of fields and whitespace make no difference."""
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=repr)
        return cls(key, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())


@dataclass(frozen=True, slots=True)
class Submission:
    """The conditions of one submission.

    Attributes:
        priority: whether the job goes before all waiting jobs without priority, and behind all
            waiting jobs with it.
        queue_limit: the most jobs that may wait in the queue before this one; None for no limit.
        owner_limit: the most jobs that the owner may have waiting and running before this one;
            None for no limit.
    """

    owner: str = OPEN_OWNER
    priority: bool = False
    webhook_url: str | None = None
    idempotency: Idempotency | None = None
    queue_limit: int | None = None
    owner_limit: int | None = None

    def refusal(self, limit: str, jobs: int) -> TooManyRequests:
        """Build the error for reaching a limit with `jobs`: "queue_full", or else the owner's."""
        if limit == "queue_full":
            return QueueFull(
                f"{jobs} jobs are waiting, and {self.queue_limit} is the most; come back in "
                f"{RETRY_AFTER_S} s.",
                retry_after_s=RETRY_AFTER_S,
            )
        return QuotaExceeded(
            f"You have {jobs} jobs waiting or running, and {self.owner_limit} is the most for "
            f"this key; wait for one to end, or cancel one.",
            retry_after_s=RETRY_AFTER_S,
        )


def conflict(job_id: str) -> IdempotencyConflict:
    """Build the error for an Idempotency-Key that was used for another body, which made a job."""
    return IdempotencyConflict(
        f"This Idempotency-Key was used for another request, which made job {job_id}; use a new "
        f"key for a new request.",
        job_id=job_id,
    )
