"""Test deliveries from the end of a job to its receiver, with a real Valkey and real sockets."""

import json
import logging
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from redis import Redis
from redis.exceptions import RedisError
from standardwebhooks import Webhook, WebhookVerificationError

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.record import Failure
from jobs.redis_client import connect
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Outbox, WebhookState
from service.app import create_app
from service.settings import ServiceSettings
from service.webhooks.delivery import MAX_CALLS_PER_HOST, Deliveries, DeliveryContext, Schedule
from service.webhooks.dispatcher import MAX_CALLS, Dispatcher
from service.webhooks.sender import Sender, tls_context
from service.webhooks.url_rules import WebhookRules
from tests.service.conftest import VIDEO_BYTES, MakeJob
from tests.service.webhooks.conftest import (
    NEXT_SECRET,
    SECRET,
    MakeEnded,
    Status,
    delivering,
    resolve_to_loopback,
)
from tests.support.webhook_receiver import Call, Receiver, hold, in_turn
from tests.support.webhook_receiver import status as answered


def webhook_id(call: Call) -> str:
    return call.headers["webhook-id"]


def test_delivered_once_and_verified(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    hook: str,
    make_job: MakeJob,
    webhook_settings: ServiceSettings,
) -> None:
    job = make_job(video=True, webhook_url=hook)
    client = TestClient(create_app(webhook_settings))
    before = client.get(f"/jobs/{job.id}").json()
    with delivering(delivery_context):
        receiver.wait()
        wait_until(lambda: client.get(f"/jobs/{job.id}").json()["webhook"]["state"] == "delivered")
    (call,) = receiver.calls
    assert webhook_id(call) == f"msg_{job.id}"
    assert call.headers["content-type"] == "application/json"
    for secret in (SECRET, NEXT_SECRET):
        message = Webhook(secret).verify(call.body, dict(call.headers))
    assert message["type"] == "job.succeeded"
    assert message["timestamp"] == before["finished_at"]
    data = message["data"]
    assert data["webhook"] == before["webhook"]
    # The link holds a time, which may have moved on.
    assert {**data, "video": {**data["video"], "url": ""}} == {
        **before,
        "video": {**before["video"], "url": ""},
    }
    link = data["video"]["url"].removeprefix(str(webhook_settings.public_url))
    assert client.get(link).content == VIDEO_BYTES
    seen = client.get(f"/jobs/{job.id}").json()["webhook"]
    assert seen.pop("delivered_at") is not None
    assert seen == {
        "url": hook,
        "state": "delivered",
        "tries": 1,
        "last_status": 204,
        "last_error": None,
    }


def test_what_was_changed_on_the_way_does_not_verify(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
) -> None:
    make_ended()
    with delivering(delivery_context):
        receiver.wait()
    (call,) = receiver.calls
    headers = dict(call.headers)
    assert Webhook(SECRET).verify(call.body, headers)["type"] == "job.cancelled"
    for body, changed in (
        (call.body.replace(b"cancelled", b"succeeded", 1), headers),
        (call.body, {**headers, "webhook-id": "msg_other"}),
        (call.body, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body, changed)


def test_a_failed_job_is_delivered(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    hook: str,
    make_job: MakeJob,
    store: JobStore,
) -> None:
    job = make_job(webhook_url=hook)
    failure = Failure(code="out_of_device_memory", detail="It did not fit.")
    store.fail(store.claim(job.id, "w"), failure)
    with delivering(delivery_context):
        receiver.wait()
    message = json.loads(receiver.calls[0].body)
    assert message["type"] == "job.failed"
    assert message["data"]["failure"] == failure.model_dump()
    assert message["data"]["video"] is None


def test_a_receiver_that_was_down_is_called_later(
    delivery_context: DeliveryContext,
    status: Status,
    make_ended: MakeEnded,
    unused_port: int,
) -> None:
    url = f"http://hooks.example.com:{unused_port}/"
    rules = WebhookRules((replace(delivery_context.rules.hosts[0], port=unused_port),), http=True)
    patient = replace(delivery_context, rules=rules, schedule=Schedule(pauses_s=(0.2,) * 100))
    job = make_ended(url)
    late = Receiver()
    with delivering(patient):
        wait_until(lambda: status(job).tries >= 2)
        assert status(job).state is WebhookState.PENDING
        assert status(job).last_error == "no connection"
        with late.listening(port=unused_port):
            late.wait()
            wait_until(lambda: status(job).state is WebhookState.DELIVERED)
    assert len(late.calls) == 1
    assert status(job).tries >= 3
    assert status(job).last_error is None


def test_errors_are_repeated_with_the_same_id(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
    redis: Redis,
) -> None:
    receiver.answer = in_turn(500, 503, 204)
    job = make_ended()
    with delivering(delivery_context):
        receiver.wait(3)
        wait_until(lambda: status(job).state is WebhookState.DELIVERED)
    assert {webhook_id(call) for call in receiver.calls} == {f"msg_{job.id}"}
    assert [json.loads(call.body)["data"]["webhook"]["tries"] for call in receiver.calls] == [
        0,
        1,
        2,
    ]
    shape = "wan-mini|bf16|96x96|17|1"
    found = {
        outcome: redis.hget(redis_keys.METRICS, f"webhook|{shape}|{outcome}")
        for outcome in ("retried", "delivered")
    }
    assert found == {"retried": b"2", "delivered": b"1"}


@pytest.mark.parametrize(("code", "tries"), [(500, 4), (307, 4), (404, 4), (410, 1)])
def test_given_up_in_the_end(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
    code: int,
    tries: int,
) -> None:
    receiver.answer = answered(code, Location=f"http://127.0.0.1:{receiver.port}/trap")
    job = make_ended()
    with delivering(delivery_context):
        wait_until(lambda: status(job).state is WebhookState.GIVEN_UP)
    assert (status(job).tries, status(job).last_status) == (tries, code)
    assert [call.path for call in receiver.calls] == ["/done"] * tries


def test_an_allowed_name_that_leads_inside_is_not_called(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
) -> None:
    strict = Sender(tls_context(), private=False, resolve=resolve_to_loopback)
    job = make_ended()
    with delivering(replace(delivery_context, sender=strict)):
        wait_until(lambda: status(job).state is WebhookState.GIVEN_UP)
    assert receiver.calls == []
    assert status(job).last_error == "the host has an address which may not be called"


def test_what_is_no_longer_allowed_is_given_up_at_once(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
) -> None:
    job = make_ended()
    with delivering(replace(delivery_context, rules=replace(delivery_context.rules, http=False))):
        wait_until(lambda: status(job).state is WebhookState.GIVEN_UP)
    assert receiver.calls == []
    assert status(job).tries == 1
    assert "https://" in str(status(job).last_error)


def test_a_record_nobody_can_read_waits_for_another_version_but_not_for_ever(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
    redis: Redis,
) -> None:
    odd, sound = make_ended(), make_ended()
    redis.hset(redis_keys.record(odd.id), "format", "2")
    with delivering(delivery_context):
        wait_until(lambda: status(odd).tries >= 1)
        assert status(odd).state is WebhookState.PENDING
        wait_until(lambda: redis.zcard(redis_keys.WEBHOOKS_DUE) == 0)
    found = status(odd)
    assert (found.state, found.tries) == (WebhookState.GIVEN_UP, 4)
    assert "has the format '2'" in str(found.last_error)
    assert [webhook_id(call) for call in receiver.calls] == [f"msg_{sound.id}"]


def test_deleted_jobs_are_dropped(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    hook: str,
    make_job: MakeJob,
    store: JobStore,
    redis: Redis,
) -> None:
    deleted, running = (make_job(webhook_url=hook) for _ in range(2))
    attempt = store.claim(running.id, "w")
    store.purge(running.id)
    store.cancelled(attempt)
    redis.zadd(redis_keys.WEBHOOKS_DUE, {"nobody": 1, deleted.id: 2})
    redis.delete(redis_keys.record(deleted.id))
    assert redis.zcard(redis_keys.WEBHOOKS_DUE) == 3
    with delivering(delivery_context):
        wait_until(lambda: redis.zcard(redis_keys.WEBHOOKS_DUE) == 0)
    assert receiver.calls == []


def test_a_slow_host_leaves_room_for_others(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
) -> None:
    """More calls of the slow host are due than one process makes at a time."""
    slow = Receiver()
    slow.answer = hold(slow)
    with slow.listening(port=0):
        host = replace(delivery_context.rules.hosts[0], host="slow.example.com", port=slow.port)
        rules = replace(delivery_context.rules, hosts=(*delivery_context.rules.hosts, host))
        for _ in range(MAX_CALLS + 10):
            url = f"http://slow.example.com:{slow.port}/"
            make_ended(url)
        quick = [make_ended() for _ in range(3)]
        patient = Sender(tls_context(), private=True, resolve=resolve_to_loopback)
        with delivering(replace(delivery_context, rules=rules, sender=patient)):
            slow.wait()
            # Each call of the slow host takes 10 s; these have to be through long before.
            receiver.wait(3, timeout=8)
            assert len(slow.calls) == MAX_CALLS_PER_HOST
    assert sorted(map(webhook_id, receiver.calls)) == sorted(f"msg_{job.id}" for job in quick)


def test_processes_share_the_work(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    redis: Redis,
) -> None:
    jobs = [make_ended() for _ in range(60)]
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(delivering(delivery_context))
        receiver.wait(len(jobs), timeout=60)
        wait_until(lambda: redis.zcard(redis_keys.WEBHOOKS_DUE) == 0)
    assert sorted(map(webhook_id, receiver.calls)) == sorted(f"msg_{job.id}" for job in jobs)


def test_a_call_in_hand_at_the_end_is_given_back(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    status: Status,
) -> None:
    receiver.answer = hold(receiver)
    job = make_ended()
    with delivering(delivery_context):
        receiver.wait()
    assert status(job).tries == 0
    receiver.answer = in_turn(204)
    with delivering(delivery_context):
        # Long before the lease would have run out.
        receiver.wait(timeout=20)
        wait_until(lambda: status(job).state is WebhookState.DELIVERED)
    assert len(receiver.calls) == 2


def test_redis_errors_end_the_run(delivery_context: DeliveryContext, unused_port: int) -> None:
    with connect(f"redis://127.0.0.1:{unused_port}/0") as nobody:
        outbox = Outbox(nobody)
        dispatcher = Dispatcher(
            outbox, Deliveries(replace(delivery_context, outbox=outbox)).deliver
        )
        with pytest.raises(RedisError):
            dispatcher.run(threading.Event())


def test_addresses_are_not_logged(
    delivery_context: DeliveryContext,
    receiver: Receiver,
    make_ended: MakeEnded,
    hook: str,
    status: Status,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They may hold the receiver's own secrets."""
    caplog.set_level(logging.DEBUG, logger="service")
    receiver.answer = in_turn(500, 204)
    job = make_ended(f"{hook}?token=hidden")
    with delivering(delivery_context):
        wait_until(lambda: status(job).state is WebhookState.DELIVERED)
    assert job.id in caplog.text
    assert "hidden" not in caplog.text
