"""Describe the conditions of one submission: owner, priority, webhook, idempotency and limits."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        metadata: the caller's own notes, which each job keeps.
        is_group: whether the jobs of the submission get the id of a group.
        queue_limit: the most jobs that may wait in the queue before this one; None for no limit.
        owner_limit: the most jobs that the owner may have waiting and running before this one;
            None for no limit.
    """

    owner: str = OPEN_OWNER
    priority: bool = False
    webhook_url: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_group: bool = False
    idempotency: Idempotency | None = None
    queue_limit: int | None = None
    owner_limit: int | None = None

    def refusal(self, limit: str, jobs: int, asked: int = 1) -> TooManyRequests:
        """Build the error for reaching a limit with `jobs`: "queue_full", or else the owner's.

        Args:
            asked: how many further jobs were asked for.
        """
        more = "" if asked == 1 else f", too many for {asked} more"
        is_one = jobs == 1
        if limit == "queue_full":
            return QueueFull(
                f"{jobs} {'job is' if is_one else 'jobs are'} waiting, and {self.queue_limit} is "
                f"the most{more}; come back in {RETRY_AFTER_S} s.",
                retry_after_s=RETRY_AFTER_S,
            )
        return QuotaExceeded(
            f"You have {jobs} {'job' if is_one else 'jobs'} waiting or running, and "
            f"{self.owner_limit} is the most for this key{more}; wait for one to end, or "
            "cancel one.",
            retry_after_s=RETRY_AFTER_S,
        )


def conflict(job_id: str) -> IdempotencyConflict:
    """Build the error for an Idempotency-Key that was used for another body, which made a job."""
    return IdempotencyConflict(
        f"This Idempotency-Key was used for another request, which made job {job_id}; use a new "
        f"key for a new request.",
        job_id=job_id,
    )
