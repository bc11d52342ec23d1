"""The list of what a service process does beside answering requests."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from jobs.record import JobRecord
from jobs.store import recovery
from jobs.store.webhook_outbox import WebhookStatus
from service.api.deps import AppState
from service.maintenance import retention
from service.maintenance.retention import Retention
from service.maintenance.scheduler import Task
from service.schemas.jobs import JobView
from service.schemas.video_url import VideoLinks
from service.webhooks.delivery import Deliveries, DeliveryContext
from service.webhooks.dispatcher import Dispatcher
from service.webhooks.message import Signer
from service.webhooks.retry import Schedule
from service.webhooks.sender import Sender, tls_context

DELETIONS_EVERY_S: Final = 5.0
TOKENIZERS_EVERY_S: Final = 10.0
"""Seldom, so that processes which were not started together do not all read a new one in the same
seconds: they can do nothing else then."""
WEBHOOKS_AGAIN_S: Final = 1.0
"""After a fault: until then they are under way all the time."""


def chores(parts: AppState) -> Sequence[Task]:
    """Name every task; each works on the parts of the application."""
    recover = recovery.Recovery(parts.redis)
    retain = Retention(parts.redis, parts.artifacts, parts.settings.keep)
    sweep = partial(retention.sweep_deletions, parts.redis, parts.artifacts)
    tasks = [
        Task("recovery", recovery.EVERY_S, lambda _: recover.run()),
        Task("deletion", DELETIONS_EVERY_S, sweep),
        Task("retention", retention.ASK_EVERY_S, retain.run_if_due),
        Task("tokenizers", TOKENIZERS_EVERY_S, lambda _: _prepare_tokenizers(parts)),
    ]
    webhooks = courier(parts)
    if webhooks is not None:
        tasks.append(Task("webhooks", WEBHOOKS_AGAIN_S, webhooks.run))
    return tasks


def _prepare_tokenizers(parts: AppState) -> None:
    named = (offer.model.tokenizer for offer in parts.catalog.get().offers)
    parts.tokens.prepare(name for name in named if name is not None)


def courier(parts: AppState) -> Dispatcher | None:
    """Build what delivers webhooks; None where no host may be called."""
    if not parts.settings.webhook_rules.hosts:
        return None
    return Dispatcher(parts.outbox, Deliveries(office(parts)).deliver)


def office(parts: AppState) -> DeliveryContext:
    """Gather what deliveries work with."""
    settings = parts.settings
    assert settings.public_url is not None, "the settings demand it where there are hosts"
    links = VideoLinks(settings.public_url, parts.signer, settings.keep)

    def present(job: JobRecord, status: WebhookStatus) -> JobView:
        return JobView.of(job, links, status)

    return DeliveryContext(
        store=parts.store,
        outbox=parts.outbox,
        present=present,
        rules=settings.webhook_rules,
        signer=Signer(settings.webhook_secrets),
        sender=Sender(tls_context(), private=settings.webhook_private),
        schedule=Schedule(),
    )
