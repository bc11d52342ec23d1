"""List the background tasks of a service process, and build the objects they use."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from jobs import catalog
from jobs.record import JobRecord
from jobs.store import recovery
from jobs.store.webhook_outbox import WebhookStatus
from service.api.deps import AppState
from service.comparisons import orchestrator
from service.comparisons.orchestrator import Orchestrator
from service.maintenance import retention
from service.maintenance.retention import Retention
from service.maintenance.scheduler import Task
from service.schemas.jobs import JobView
from service.schemas.video_url import VideoLinks
from service.webhooks.delivery import Deliveries, DeliveryContext, Schedule
from service.webhooks.dispatcher import Dispatcher
from service.webhooks.message import Signer
from service.webhooks.sender import Sender, tls_context

DELETIONS_EVERY_S: Final = 5.0
STORE_EVERY_S: Final = 15.0
"""How often a process looks whether the artifact store is the right one. The first look is at its
start; what it finds is in the log and in the metric `wan_artifacts_up`."""
REDIS_EVERY_S: Final = 60.0
"""How often a process looks at Redis' settings: they can be changed while it runs."""
TOKENIZERS_EVERY_S: Final = 10.0
"""Seldom, so that processes which were not started together do not all read a new tokenizer in the
same seconds. A process can do nothing else while it reads one."""
WEBHOOKS_AGAIN_S: Final = 1.0
"""The pause after an error. Without an error the dispatcher runs until the process ends."""


def background_tasks(app_state: AppState) -> Sequence[Task]:
    """List the tasks that the application's scheduler runs."""
    job_recovery = recovery.Recovery(app_state.redis)
    job_retention = Retention(
        app_state.redis, app_state.artifacts, app_state.settings.retention_periods
    )
    delete_requested = partial(
        retention.run_requested_deletions, app_state.redis, app_state.artifacts
    )
    tasks = [
        Task("recovery", recovery.INTERVAL_S, lambda _: job_recovery.run()),
        Task("deletion", DELETIONS_EVERY_S, delete_requested),
        Task("artifact store", STORE_EVERY_S, lambda _: app_state.artifacts.verify()),
        Task("comparisons", orchestrator.EVERY_S, _orchestrator(app_state).run),
        Task("redis settings", REDIS_EVERY_S, lambda _: app_state.checks.look_at_redis()),
        Task("retention", retention.CHECK_EVERY_S, job_retention.run_if_due),
        Task("tokenizers", TOKENIZERS_EVERY_S, lambda _: _prepare_tokenizers(app_state)),
    ]
    dispatcher = build_dispatcher(app_state)
    if dispatcher is not None:
        tasks.append(Task("webhooks", WEBHOOKS_AGAIN_S, dispatcher.run))
    return tasks


def _orchestrator(app_state: AppState) -> Orchestrator:
    return Orchestrator(
        app_state.redis,
        app_state.store,
        app_state.artifacts,
        lambda: catalog.read(app_state.redis),
        app_state.token_counter.count,
    )


def _prepare_tokenizers(app_state: AppState) -> None:
    named = (offer.model.tokenizer for offer in app_state.catalog.get().offers)
    app_state.token_counter.prepare(name for name in named if name is not None)


def build_dispatcher(app_state: AppState) -> Dispatcher | None:
    """Build the dispatcher of webhooks; None if the settings allow no host to be called."""
    if not app_state.settings.webhook_rules.hosts:
        return None
    return Dispatcher(app_state.outbox, Deliveries(delivery_context(app_state)).deliver)


def delivery_context(app_state: AppState) -> DeliveryContext:
    """Gather the objects that deliveries use. The settings must allow hosts to be called."""
    settings = app_state.settings
    assert settings.public_url is not None, "the settings require it if there are webhook hosts"
    links = VideoLinks(settings.public_url, app_state.link_signer, settings.retention_periods)

    def make_view(job: JobRecord, status: WebhookStatus) -> JobView:
        return JobView.of(job, links, status)

    return DeliveryContext(
        store=app_state.store,
        outbox=app_state.outbox,
        make_view=make_view,
        rules=settings.webhook_rules,
        signer=Signer(settings.webhook_secrets),
        sender=Sender(tls_context(), private=settings.webhook_private),
        schedule=Schedule(),
    )
