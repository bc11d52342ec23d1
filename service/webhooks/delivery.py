"""Deliver one leased webhook: read its job, send the message, and record the outcome.

Redis is called in other threads, because the event loop has to keep the time limits of all calls
under way.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

from redis.exceptions import RedisError

from jobs.errors import JobNotFound, RecordUnreadable
from jobs.record import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Lease, Outbox, Outcome, WebhookStatus
from jobs.telemetry import job_spans, tracing
from jobs.telemetry.tracing import TraceContext
from service.schemas.jobs import JobView
from service.webhooks.message import Signer, WebhookMessage
from service.webhooks.sender import Answer, Sender
from service.webhooks.url_rules import Target, TargetRefused, WebhookRules

logger = logging.getLogger(__name__)

MAX_CALLS_PER_HOST: Final = 4
"""Calls under way to one host in one process, so that a slow host leaves room for the others."""
HOST_BUSY_S: Final = 1.0
"""Seconds after which a call whose host was busy is due again."""
FAULT_S: Final = 300.0
"""Seconds after which a delivery that failed through an error in this program is tried again."""

MakeView = Callable[[JobRecord, WebhookStatus], JobView]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The schedule by which a failed call is repeated and finally given up.

    Attributes:
        pauses_s: seconds to wait after the first, second, … failed try. After as many repeats the
            call is given up.
        jitter: by which share of itself a pause is shortened or lengthened at random.
        max_retry_after_s: a receiver may ask for a longer pause (Retry-After), of up to this.
    """

    pauses_s: tuple[float, ...] = (5, 30, 2 * 60, 10 * 60, 60 * 60, 6 * 60 * 60)
    jitter: float = 0.2
    max_retry_after_s: float = 60 * 60

    def outcome(self, answer: Answer, tries_before: int) -> Outcome:
        """Decide from a receiver's answer whether the webhook is delivered, repeated or given up.

        Args:
            tries_before: the tries before the one that was answered.
        """
        status = answer.status
        if status is not None and 200 <= status < 300:
            return Outcome(status)
        pause_s = None if status == HTTPStatus.GONE else self._pause_s(answer, tries_before)
        return Outcome(status, _error(answer), pause_s)

    def _pause_s(self, answer: Answer, tries_before: int) -> float | None:
        if tries_before >= len(self.pauses_s):
            return None
        # Spread, so that calls that failed together are not repeated together.
        pause_s = self.pauses_s[tries_before] * random.uniform(1 - self.jitter, 1 + self.jitter)
        return max(pause_s, min(_retry_after_s(answer.retry_after), self.max_retry_after_s))


@dataclass(frozen=True, slots=True)
class DeliveryContext:
    """The objects that deliveries use. `make_view` makes the JSON of a job, as callers see it."""

    store: JobStore
    outbox: Outbox
    make_view: MakeView
    rules: WebhookRules
    signer: Signer
    sender: Sender
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class _Call:
    """A message to send, and how often that was tried before."""

    target: Target
    body: bytes
    tries_before: int
    trace: TraceContext | None


class Deliveries:
    """Delivers leased webhooks. Belongs to one event loop."""

    def __init__(self, context: DeliveryContext) -> None:
        self._context = context
        self._under_way: Counter[str] = Counter()  # by host

    async def deliver(self, lease: Lease) -> None:
        """Make one try. Redis errors are raised: the lease then runs out by itself."""
        try:
            call = await asyncio.to_thread(self._prepare, lease)
            if call is not None:
                await self._send(lease, call)
        except TargetRefused as error:
            # The rules have changed since the job was requested.
            await self._settle(lease, Outcome(error=f"the address {error}"))
        except RecordUnreadable as error:
            # A process of the version that wrote the record may deliver it. If none does, the
            # schedule ends the tries.
            tries = await asyncio.to_thread(self._context.outbox.tries, lease.job_id)
            answer = Answer(error=error.detail)
            await self._settle(lease, self._context.schedule.outcome(answer, tries))
        except RedisError:
            raise
        except Exception:
            # Postponed explicitly: when its lease ran out it would be tried again every minute.
            logger.exception("the webhook of job %s cannot be sent now", lease.job_id)
            await self._postpone(lease, FAULT_S)

    def _prepare(self, lease: Lease) -> _Call | None:
        """Build the message about the job as it is now; None if the webhook was dropped.

        It is dropped if the job is gone, or has no webhook.
        """
        context = self._context
        try:
            job = context.store.get(lease.job_id)
        except JobNotFound:
            context.outbox.drop(lease.job_id)
            return None
        status = context.outbox.status(job)
        if job.webhook_url is None or status is None:
            context.outbox.drop(lease.job_id)
            return None
        target = context.rules.target(job.webhook_url)
        message = WebhookMessage.about(context.make_view(job, status))
        return _Call(target, message.model_dump_json().encode(), status.tries, job.trace)

    async def _send(self, lease: Lease, call: _Call) -> None:
        host = call.target.host
        if self._under_way[host] >= MAX_CALLS_PER_HOST:
            await self._postpone(lease, HOST_BUSY_S)
            return
        self._under_way[host] += 1
        try:
            answer = await self._post(lease, call)
        finally:
            self._under_way[host] -= 1
        await self._settle(lease, self._context.schedule.outcome(answer, call.tries_before))

    async def _post(self, lease: Lease, call: _Call) -> Answer:
        host, tries = call.target.host, call.tries_before
        with job_spans.webhook_call(lease.job_id, call.trace, host, tries) as span:
            headers = dict(self._context.signer.headers(lease.job_id, call.body))
            # The receiver may go on with the trace.
            headers |= tracing.current_fields()
            answer = await self._context.sender.post(call.target, headers, call.body)
            if answer.status is None:
                span.fail("no_answer")
            else:
                span.set({"http.response.status_code": answer.status})
                if answer.status >= 300:
                    span.fail(str(answer.status))
        return answer

    async def _postpone(self, lease: Lease, seconds: float) -> None:
        await asyncio.to_thread(self._context.outbox.postpone, lease, seconds)

    async def _settle(self, lease: Lease, outcome: Outcome) -> None:
        if not await asyncio.to_thread(self._context.outbox.settle, lease, outcome):
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


def _error(answer: Answer) -> str:
    if answer.status is None:
        return answer.error or "no answer"
    if 300 <= answer.status < 400:
        return f"answered {answer.status}, and redirects are not followed"
    if answer.status == HTTPStatus.GONE:
        return "answered 410: it is gone, and not called again"
    return f"answered {answer.status}"


def _retry_after_s(retry_after: str | None) -> float:
    """Parse a Retry-After header, seconds or a date; 0 if it is absent or cannot be parsed."""
    if retry_after is None:
        return 0.0
    if retry_after.isascii() and retry_after.isdecimal():
        # Cut, because a number may be too long for a float.
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
