"""Accept requests for videos, within the caller's quota and once for each Idempotency-Key."""

import dataclasses
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
    """Queue the request in `body`, or find the jobs that the same key and body created before.

    Raises:
        InvalidSpec, ModeNotServed: from `resolve`.
        IdempotencyConflict, QueueFull, QuotaExceeded: see `JobStore.create`.
    """
    fields = body if isinstance(body, Mapping) else {}
    key = None if idempotency_key is None else Idempotency.of(idempotency_key, body)
    # Before `resolve`: a request that was accepted once is answered even when no worker is live.
    earlier = None if key is None else app_state.store.replay(principal.owner, key)
    if earlier is not None:
        created = earlier
    else:
        request, queue = resolve()
        terms = dataclasses.replace(
            submission(principal, app_state.settings),
            webhook_url=fields.get("webhook_url"),
            metadata=fields.get("metadata") or {},
            is_group=fields.get("count") is not None,
            idempotency=key,
        )
        seeds = range(request.seed, request.seed + int(fields.get("count") or 1))
        requests = [request.model_copy(update={"seed": seed}) for seed in seeds]
        created = app_state.store.create_all(requests, queue, submission=terms)
    note_created(created.job.id)
    return created


def submission(principal: Principal, settings: ServiceSettings) -> Submission:
    """Return the terms of the principal's submission: owner, priority, limits."""
    quota = principal.quota
    if quota is None and principal.role is Role.USER:
        quota = settings.quota
    return Submission(
        owner=principal.owner,
        priority=principal.role is Role.OPS,
        queue_limit=settings.max_waiting,
        owner_limit=quota,
    )
