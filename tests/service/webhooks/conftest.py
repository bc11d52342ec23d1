"""Define fixtures of webhooks: a receiver, deliveries with short pauses, a running dispatcher."""

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
from service.maintenance import tasks
from service.settings import ServiceSettings
from service.webhooks.delivery import Deliveries, DeliveryContext, Schedule
from service.webhooks.dispatcher import Dispatcher
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
    """The URL of the receiver, by a name that only the tests' resolver knows."""
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
def delivery_context(webhook_settings: ServiceSettings) -> DeliveryContext:
    """What the service builds, except for shorter pauses and the tests' resolver."""
    limits = TimeLimits(connect_s=2, total_s=2, rest_s=0.5)
    return replace(
        tasks.delivery_context(create_app(webhook_settings).state.app_state),
        schedule=Schedule(pauses_s=(0.1, 0.1, 0.1)),
        sender=Sender(tls_context(), private=True, limits=limits, resolve=resolve_to_loopback),
    )


@contextmanager
def delivering(delivery_context: DeliveryContext) -> Iterator[None]:
    """Run a dispatcher for the length of the block; its errors fail the test."""
    ending = threading.Event()
    dispatcher = Dispatcher(delivery_context.outbox, Deliveries(delivery_context).deliver)
    thread = threading.Thread(target=dispatcher.run, args=(ending,))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def make_ended(make_job: MakeJob, store: JobStore, hook: str) -> MakeEnded:
    """Make a cancelled job whose webhook is due."""
    return lambda url=hook: store.cancel(make_job(webhook_url=url).id)


@pytest.fixture
def status(redis: Redis) -> Status:
    """Read the status of a job's webhook."""

    def status(job: JobRecord) -> WebhookStatus:
        found = Outbox(redis).status(job)
        assert found is not None
        return found

    return status
