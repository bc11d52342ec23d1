"""One leased webhook, from the job's record to the entry that says what became of it.

Redis is spoken to in other threads: the event loop keeps the time of all calls under way.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from redis.exceptions import RedisError

from jobs.errors import JobNotFound, RecordUnreadable
from jobs.record import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Lease, Outbox, Outcome, WebhookStatus
from service.schemas.jobs import JobView
from service.webhooks.message import Signer, WebhookMessage
from service.webhooks.retry import Schedule
from service.webhooks.sender import Answer, Sender
from service.webhooks.url_rules import Target, TargetRefused, WebhookRules

logger = logging.getLogger(__name__)

MOST_PER_HOST: Final = 4
"""Calls of one host under way in one process, so that a slow one leaves room for the others."""
HOST_BUSY_S: Final = 1.0
"""When a call that found its host busy is due again."""
FAULT_S: Final = 300.0
"""When to try again what failed for a fault of this program's own."""

Present = Callable[[JobRecord, WebhookStatus], JobView]


@dataclass(frozen=True, slots=True)
class DeliveryContext:
    """What deliveries work with."""

    store: JobStore
    outbox: Outbox
    present: Present
    rules: WebhookRules
    signer: Signer
    sender: Sender
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class _Call:
    """What is to be sent where, after how many tries."""

    target: Target
    body: bytes
    tries_before: int


class Deliveries:
    """Delivers leased webhooks. Belongs to one event loop."""

    def __init__(self, office: DeliveryContext) -> None:
        self._office = office
        self._under_way: Counter[str] = Counter()

    async def deliver(self, lease: Lease) -> None:
        """Make one try. Redis errors pass through: the lease then runs out by itself."""
        try:
            call = await asyncio.to_thread(self._prepare, lease)
            if call is not None:
                await self._send(lease, call)
        except TargetRefused as error:
            # What is allowed has changed since the request came.
            await self._settle(lease, Outcome(error=f"the address {error}"))
        except RecordUnreadable as error:
            # Another process may be of the version that wrote it; but not for ever.
            tries = await asyncio.to_thread(self._office.outbox.tries, lease.job_id)
            answer = Answer(error=error.detail)
            await self._settle(lease, self._office.schedule.outcome(answer, tries))
        except RedisError:
            raise
        except Exception:
            # Not left to the lease: it would be back every minute.
            logger.exception("the webhook of job %s cannot be sent now", lease.job_id)
            await self._postpone(lease, FAULT_S)

    def _prepare(self, lease: Lease) -> _Call | None:
        """Make the message of the job as it stands; None if nobody is to be told any more."""
        office = self._office
        try:
            job = office.store.get(lease.job_id)
        except JobNotFound:
            office.outbox.drop(lease.job_id)
            return None
        status = office.outbox.status(job)
        if job.webhook_url is None or status is None:
            office.outbox.drop(lease.job_id)
            return None
        target = office.rules.target(job.webhook_url)
        message = WebhookMessage.about(office.present(job, status))
        return _Call(target, message.model_dump_json().encode(), status.tries)

    async def _send(self, lease: Lease, call: _Call) -> None:
        host = call.target.host
        if self._under_way[host] >= MOST_PER_HOST:
            await self._postpone(lease, HOST_BUSY_S)
            return
        self._under_way[host] += 1
        try:
            headers = self._office.signer.headers(lease.job_id, call.body)
            answer = await self._office.sender.post(call.target, headers, call.body)
        finally:
            self._under_way[host] -= 1
        await self._settle(lease, self._office.schedule.outcome(answer, call.tries_before))

    async def _postpone(self, lease: Lease, seconds: float) -> None:
        await asyncio.to_thread(self._office.outbox.postpone, lease, seconds)

    async def _settle(self, lease: Lease, outcome: Outcome) -> None:
        if not await asyncio.to_thread(self._office.outbox.settle, lease, outcome):
            logger.info("the webhook of job %s was settled elsewhere", lease.job_id)
        elif outcome.error is None:
            logger.info("the webhook of job %s was delivered", lease.job_id)
        elif outcome.retry_in_s is None:
            logger.warning("the webhook of job %s is given up: %s", lease.job_id, outcome.error)
        else:
            logger.info(
                "the webhook of job %s failed and is repeated in %.0f s: %s",
                lease.job_id,
                outcome.retry_in_s,
                outcome.error,
            )
