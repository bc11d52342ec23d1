"""Keep the outbox: the webhooks that are due, and the delivery status of each job's webhook.

The atomic step that ends a job adds its webhook (`jobs/store/lua/prelude.lua`), so none is missed.
Any number of processes take entries from the outbox. An entry is leased to the process that takes
it, and is due again if that process does not settle it before the lease ends. A webhook is called
at least once, and sometimes twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict
from redis import Redis

from jobs import record, redis_keys
from jobs.record import JobRecord
from jobs.store import scripts

LEASE_S: Final = 60.0
"""How long a process may hold one entry; its HTTP timeouts are much shorter."""


class WebhookState(StrEnum):
    """The delivery state of a webhook."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class WebhookStatus(BaseModel):
    """The delivery status of one job's webhook.

    `last_status` is the HTTP status of the latest try, None without a response. `last_error` says
    why the latest try failed, None if it did not.
    """

    model_config = ConfigDict(frozen=True)

    state: WebhookState = WebhookState.PENDING
    tries: int = 0
    last_status: int | None = None
    last_error: str | None = None
    delivered_at: AwareDatetime | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to call one job's webhook; `until_ms`, on Redis' clock, identifies the lease."""

    job_id: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one try: delivered, unless there is an `error`.

    A failed try is repeated after `retry_in_s`, or never if that is None.
    """

    status: int | None = None
    error: str | None = None
    retry_in_s: float | None = None


class Outbox:
    """All access to the outbox. Safe to share between threads; Redis errors are not caught."""

    def __init__(self, redis: Redis, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._lease_ms = int(lease_s * 1000)
        self._take = scripts.load(redis, "webhook_take")
        self._settle = scripts.load(redis, "webhook_settle")

    def take(self, most: int) -> list[Lease]:
        """Lease up to `most` webhooks that are due, the longest due first."""
        answer = cast("list[bytes]", self._take(most, self._lease_ms))
        pairs = zip(answer[::2], answer[1::2], strict=True)
        return [Lease(job_id.decode(), int(until)) for job_id, until in pairs]

    def settle(self, lease: Lease, outcome: Outcome) -> bool:
        """Record one try; return False, and write nothing, if the lease has ended."""
        if outcome.error is None:
            result, fields = "delivered", {"delivered_at": record.now().isoformat()}
        else:
            result = "given_up" if outcome.retry_in_s is None else "retried"
            fields = {"last_error": outcome.error}
        if outcome.status is not None:
            fields["last_status"] = str(outcome.status)
        pairs = [text for field in fields.items() for text in field]
        return self._end(lease, result, outcome.retry_in_s or 0.0, *pairs)

    def postpone(self, lease: Lease, seconds: float) -> bool:
        """End a lease without a try; the webhook is due again after `seconds`."""
        return self._end(lease, "postponed", seconds)

    def drop(self, job_id: str) -> None:
        """Remove the webhook of a job that no longer exists."""
        with self._redis.pipeline() as pipe:
            pipe.zrem(redis_keys.WEBHOOKS_DUE, job_id)
            pipe.delete(redis_keys.webhook(job_id))
            pipe.execute()

    def status(self, job: JobRecord) -> WebhookStatus | None:
        """Read the delivery status of the job's webhook; None for a job without one."""
        return self.statuses([job])[0]

    def statuses(self, jobs: Sequence[JobRecord]) -> list[WebhookStatus | None]:
        """Read the delivery status of many jobs, in their order, in at most one round trip."""
        found: dict[str, WebhookStatus] = {}
        with_webhook = [job.id for job in jobs if job.webhook_url is not None]
        if with_webhook:
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in with_webhook:
                    pipe.hgetall(redis_keys.webhook(job_id))
                for job_id, fields in zip(with_webhook, pipe.execute(), strict=True):
                    found[job_id] = _decode(fields)
        return [found.get(job.id) for job in jobs]

    def tries(self, job_id: str) -> int:
        """Return how often a job's webhook was called; needs no readable record."""
        found = self._redis.hget(redis_keys.webhook(job_id), "tries")
        return 0 if found is None else int(cast("bytes", found))

    def _end(self, lease: Lease, result: str, seconds: float, *pairs: str) -> bool:
        answer = self._settle(lease.job_id, lease.until_ms, result, int(seconds * 1000), *pairs)
        return bool(answer == b"ok")


def _decode(fields: dict[bytes, bytes]) -> WebhookStatus:
    return WebhookStatus.model_validate({k.decode(): v.decode() for k, v in fields.items()})
