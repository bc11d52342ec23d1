"""What comes with a request besides the video it asks for: who asks, and on what terms."""

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from jobs.errors import QueueFull, QuotaExceeded, TooManyRequests

OPEN_OWNER = "local"
"""Who owns the jobs of a service that asks for no keys."""

RETRY_AFTER_S: Final = 10
"""When to come back after a refusal because of too many jobs: about the end of a short one."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key for one request: the same key and body mean the same job."""

    key: str
    body_sha256: str

    @classmethod
    def of(cls, key: str, body: object) -> "Idempotency":
        """body: the parsed JSON; two spellings of the same document are the same."""
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=repr)
        return cls(key, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())


@dataclass(frozen=True, slots=True)
class Submission:
    """The terms of one request.

    Attributes:
        priority: goes before all that wait without, behind all that wait with it.
        queue_limit: the most jobs that may wait in the queue before this one; None for no limit.
        owner_limit: the most jobs the owner may have waiting and running before this one.
    """

    owner: str = OPEN_OWNER
    priority: bool = False
    webhook_url: str | None = None
    idempotency: Idempotency | None = None
    queue_limit: int | None = None
    owner_limit: int | None = None

    def refusal(self, limit: str, jobs: int) -> TooManyRequests:
        """What to raise where `jobs` reach a limit: "queue_full", or the owner's."""
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
