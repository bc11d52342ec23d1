"""Fixtures of webhooks: a receiver, an office with short pauses, and couriers at work."""

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from pydantic import SecretStr
from redis import Redis

from jobs.record import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Outbox, WebhookStatus
from service.app import create_app
from service.maintenance.tasks import office as build_office
from service.settings import ServiceSettings
from service.webhooks.delivery import Deliveries, DeliveryContext
from service.webhooks.dispatcher import Dispatcher
from service.webhooks.retry import Schedule
from service.webhooks.sender import Sender, TimeLimits, tls_context
from tests.service.conftest import MakeJob
from tests.support.webhook_receiver import Receiver

HOST = "hooks.example.com"
SECRET = "whsec_" + base64.b64encode(b"first secret of the tests".ljust(32)).decode()
NEXT_SECRET = "whsec_" + base64.b64encode(b"the one it is changed for".ljust(32)).decode()

MakeEnded = Callable[..., JobRecord]
Status = Callable[[JobRecord], WebhookStatus]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as receiver:
        yield receiver


@pytest.fixture
def hook(receiver: Receiver) -> str:
    """The address of the receiver, by a name that only our resolver knows."""
    return f"http://{HOST}:{receiver.port}/done"


@pytest.fixture
def webhook_settings(settings: ServiceSettings, receiver: Receiver) -> ServiceSettings:
    return settings.model_copy(
        update={
            "webhook_hosts": f"{HOST}:{receiver.port}",
            "webhook_secret": SecretStr(f"{SECRET},{NEXT_SECRET}"),
            "webhook_http": True,
            "webhook_private": True,
        }
    )


async def resolve_to_loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


@pytest.fixture
def office(webhook_settings: ServiceSettings) -> DeliveryContext:
    """What the service builds, but for the pauses and the names of hosts."""
    limits = TimeLimits(connect_s=2, total_s=2, rest_s=0.5)
    return replace(
        build_office(create_app(webhook_settings).state.parts),
        schedule=Schedule(pauses_s=(0.1, 0.1, 0.1)),
        sender=Sender(tls_context(), private=True, limits=limits, resolve=resolve_to_loopback),
    )


@contextmanager
def working(office: DeliveryContext) -> Iterator[None]:
    """Run a courier for the length of the block; its faults are the test's."""
    ending = threading.Event()
    courier = Dispatcher(office.outbox, Deliveries(office).deliver)
    thread = threading.Thread(target=courier.run, args=(ending,))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def make_ended(make_job: MakeJob, store: JobStore, hook: str) -> MakeEnded:
    """Makes a cancelled job whose webhook is due."""
    return lambda url=hook: store.cancel(make_job(webhook_url=url).id)


@pytest.fixture
def status(redis: Redis) -> Status:
    """Reads how far a job's webhook is."""

    def status(job: JobRecord) -> WebhookStatus:
        found = Outbox(redis).status(job)
        assert found is not None
        return found

    return status
