"""Put the courier of one service process together."""

from jobs.record import JobRecord
from jobs.store.webhook_outbox import WebhookStatus
from service.deps import Parts
from service.links import VideoLinks
from service.views import JobView
from service.webhooks.courier import Courier
from service.webhooks.delivery import Deliveries, Office
from service.webhooks.message import Signer
from service.webhooks.schedule import Schedule
from service.webhooks.sender import Sender, tls_context


def courier(parts: Parts) -> Courier | None:
    """Build what delivers webhooks; None where no host may be called."""
    if not parts.settings.webhook_rules.hosts:
        return None
    return Courier(parts.outbox, Deliveries(office(parts)).deliver)


def office(parts: Parts) -> Office:
    """Gather what deliveries work with."""
    settings = parts.settings
    assert settings.public_url is not None, "the settings demand it where there are hosts"
    links = VideoLinks(settings.public_url, parts.signer, settings.keep)

    def present(job: JobRecord, status: WebhookStatus) -> JobView:
        return JobView.of(job, links, status)

    return Office(
        store=parts.store,
        outbox=parts.outbox,
        present=present,
        rules=settings.webhook_rules,
        signer=Signer(settings.webhook_secrets),
        sender=Sender(tls_context(), private=settings.webhook_private),
        schedule=Schedule(),
    )
