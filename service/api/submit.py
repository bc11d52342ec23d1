"""Accept requests for videos, within the caller's quota and once for each Idempotency-Key."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from jobs.spec import GenerationRequest
from jobs.store.job_store import Created
from jobs.store.submission import Idempotency, Submission
from service.api.deps import AppState
from service.auth.api_keys import Role
from service.auth.gate import Principal
from service.middleware.request_log import note_created
from service.settings import ServiceSettings

REPLAYED_HEADER: Final = "Idempotent-Replayed"

Resolve = Callable[[], tuple[GenerationRequest, str]]
"""Checks the request, fills in its defaults, and chooses its queue."""


def accept(
    app_state: AppState,
    principal: Principal,
    body: Any,
    idempotency_key: str | None,
    resolve: Resolve,
) -> Created:
    """Queue the request in `body`, or find the job that the same key and body created before.

    Raises:
        InvalidSpec, ModeNotServed: from `resolve`.
        IdempotencyConflict, QueueFull, QuotaExceeded: see `JobStore.create`.
    """
    key = None if idempotency_key is None else Idempotency.of(idempotency_key, body)
    # Before `resolve`: a request that was accepted once is answered even when no worker is live.
    earlier = None if key is None else app_state.store.replay(principal.owner, key)
    if earlier is not None:
        created = Created(earlier, replayed=True)
    else:
        request, queue = resolve()
        webhook_url = body.get("webhook_url") if isinstance(body, Mapping) else None
        terms = submission(principal, app_state.settings, webhook_url=webhook_url, idempotency=key)
        created = app_state.store.create(request, queue, submission=terms)
    note_created(created.job.id)
    return created


def submission(
    principal: Principal,
    settings: ServiceSettings,
    *,
    webhook_url: str | None = None,
    idempotency: Idempotency | None = None,
) -> Submission:
    """Return the terms of the principal's submission: owner, priority, limits."""
    quota = principal.quota
    if quota is None and principal.role is Role.USER:
        quota = settings.quota
    return Submission(
        owner=principal.owner,
        priority=principal.role is Role.OPS,
        webhook_url=webhook_url,
        idempotency=idempotency,
        queue_limit=settings.max_waiting,
        owner_limit=quota,
    )
