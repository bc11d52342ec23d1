"""Accept a request for a video: on the caller's terms, and once for each Idempotency-Key."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from jobs.spec import GenerationRequest
from jobs.store.job_store import Created
from jobs.store.submission import Idempotency
from service.auth import Principal, submission
from service.deps import Parts
from service.logs import note_created

REPLAYED_HEADER: Final = "Idempotent-Replayed"

Resolve = Callable[[], tuple[GenerationRequest, str]]
"""Checks and completes what is asked for, and chooses its queue."""


def accept(
    parts: Parts,
    principal: Principal,
    body: Any,
    idempotency_key: str | None,
    resolve: Resolve,
) -> Created:
    """Queue what `body` asks for, or find the job that the same key and body made before.

    Raises:
        InvalidSpec, ModeNotServed: from `resolve`.
        IdempotencyConflict, QueueFull, QuotaExceeded: see `JobStore.create`.
    """
    key = None if idempotency_key is None else Idempotency.of(idempotency_key, body)
    # First, because a request that was accepted once is answered even when no worker is live.
    earlier = None if key is None else parts.store.replay(principal.owner, key)
    if earlier is not None:
        created = Created(earlier, replayed=True)
    else:
        request, queue = resolve()
        webhook_url = body.get("webhook_url") if isinstance(body, Mapping) else None
        terms = submission(principal, parts.settings, webhook_url=webhook_url, idempotency=key)
        created = parts.store.create(request, queue, submission=terms)
    note_created(created.job.id)
    return created
