"""Test webhooks with the service as a process: nothing is lost when it is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from redis import Redis
from standardwebhooks import Webhook

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.store.webhook_outbox import WebhookState
from service.webhooks.delivery import DeliveryContext
from tests.service.webhooks.conftest import SECRET, MakeEnded, Status, delivering
from tests.support.http_service import address, service
from tests.support.webhook_receiver import Receiver

LEASE_S = 2.0


@pytest.fixture
def environment(redis_url: str, tmp_path: Path, receiver: Receiver) -> dict[str, str]:
    return {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_PORT": "0",
        "SERVICE_PUBLIC_URL": "https://video.example.com",
        "SERVICE_KEYS": "open",
        "SERVICE_WEBHOOK_HOSTS": f"127.0.0.1:{receiver.port},hooks.example.com:{receiver.port}",
        "SERVICE_WEBHOOK_SECRET": SECRET,
        "SERVICE_WEBHOOK_HTTP": "1",
        "SERVICE_WEBHOOK_PRIVATE": "1",
    }


def test_from_the_request_to_the_receiver(
    environment: dict[str, str], live_worker: WorkerOffer, receiver: Receiver
) -> None:
    url = f"http://127.0.0.1:{receiver.port}/done?token=hidden"
    with (
        service(**environment) as process,
        httpx2.Client(base_url=address(process), trust_env=False) as client,
    ):
        answer = client.post("/generate", json={"prompt": "private", "webhook_url": url})
        assert answer.status_code == 202, answer.text
        job = answer.headers["location"]
        assert client.get(job).json()["webhook"]["state"] == "pending"
        assert client.delete(job).json()["state"] == "cancelled"
        receiver.wait()
        wait_until(lambda: client.get(job).json()["webhook"]["state"] == "delivered")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    (call,) = receiver.calls
    message = Webhook(SECRET).verify(call.body, dict(call.headers))
    assert (message["type"], call.path) == ("job.cancelled", "/done?token=hidden")
    assert message["data"]["request"]["prompt"] == "private"
    for secret in ("private", "hidden", SECRET):
        assert secret not in log
    assert "Traceback" not in log


def test_what_a_killed_process_had_in_hand_is_delivered_by_another(
    environment: dict[str, str],
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
    redis: Redis,
) -> None:
    job = make_ended()
    command = [sys.executable, "-m", "tests.service.webhooks.stuck_dispatcher", str(LEASE_S)]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ) as stuck:
        assert stuck.stdout is not None
        assert stuck.stdout.readline() == "leased\n"
        stuck.kill()
        assert stuck.wait(20) == -signal.SIGKILL
    assert receiver.calls == []
    # Still in the outbox, and not leased by others until the lease has run out.
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 1
    with delivering(delivery_context):
        receiver.wait()
        wait_until(lambda: status(job).state is WebhookState.DELIVERED)
    assert [call.headers["webhook-id"] for call in receiver.calls] == [f"msg_{job.id}"]


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("SERVICE_WEBHOOK_SECRET", "openssl rand"),
        ("SERVICE_PUBLIC_URL", "how callers reach this service"),
    ],
)
def test_it_does_not_start_half_configured(
    environment: dict[str, str], missing: str, remedy: str
) -> None:
    with service(**{**environment, missing: ""}) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert missing in log
    assert remedy in log
    assert len(log.splitlines()) == 1
