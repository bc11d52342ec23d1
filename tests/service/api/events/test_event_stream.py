"""Test `GET /jobs/{id}/events`: which events are sent, from which on, and when the stream ends."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis
from rq import Queue
from starlette.types import Message

from deploy.local.waiting import wait_until
from jobs import durations, redis_keys
from jobs.catalog import WorkerOffer
from jobs.durations import Durations
from jobs.record import Attempt, Failure, JobRecord, Progress, Stage
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import LEASE_S, JobStore
from jobs.store.live import events
from service.api.events import hub
from service.api.events.hub import SMALLEST_SHARE, Follower
from service.api.events.stream import EventStream
from service.app import MAX_BODY_BYTES
from service.auth.api_keys import Role
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey
from tests.support.http_service import Site, serving
from tests.support.sse_client import EventSource, Sent, read, stream

FAILURE = Failure(code="out_of_device_memory", detail="No room.")
LIFE = [
    ("state", "queued"),
    ("state", "running"),
    ("progress", "running"),
    ("progress", "running"),
    ("state", "failed"),
]


@pytest.fixture
def site(settings: ServiceSettings) -> Iterator[Site]:
    with serving(settings.model_copy(update={"heartbeat_s": 0.2, "max_streams": 150})) as site:
        yield site


@pytest.fixture
def job_id(store: JobStore, request_for_video: GenerationRequest) -> str:
    return store.create(request_for_video, "q").job.id


def step(store: JobStore, attempt: Attempt, number: int) -> None:
    store.progress(attempt, Progress(stage=Stage.DENOISE, step=number, steps=20, seconds_left=3.5))


def run_job(store: JobStore, job_id: str) -> None:
    """Run a job until it fails: five events with the one of its creation."""
    attempt = store.claim(job_id, "w")
    step(store, attempt, 1)
    step(store, attempt, 2)
    store.fail(attempt, FAILURE)


def test_a_job_is_followed_from_its_creation_to_its_end(
    site: Site, store: JobStore, redis: Redis, job_id: str
) -> None:
    with stream(site.url, job_id) as (answer, sent):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        assert next(sent).retry == "2000"
        first = next(each for each in sent if each.event == "state")
        assert first.data["state"] == "queued"
        run_job(store, job_id)
        found = [first, *(each for each in sent if each.event not in ("", "queue"))]
    assert [each.kind_and_state for each in found] == LIFE
    entries = events.decode(redis.xrange(redis_keys.events(job_id)))
    assert [each.id for each in found] == [entry.event_id for entry in entries]
    assert found[2].data["progress"] == {
        "stage": "denoise",
        "step": 1,
        "steps": 20,
        "seconds_left": 3.5,
    }
    assert {each.data["id"] for each in found} == {job_id}
    assert all("job" not in each.data for each in found[:-1])
    assert found[-1].data["job"] == httpx2.get(f"{site.url}/jobs/{job_id}", trust_env=False).json()
    assert found[-1].data["job"]["failure"]["code"] == FAILURE.code


def test_a_late_client_gets_every_event(site: Site, store: JobStore, job_id: str) -> None:
    run_job(store, job_id)
    assert [each.kind_and_state for each in read(site.url, job_id)] == LIFE


@pytest.mark.parametrize("number", range(4))
def test_what_came_before_the_last_event_is_not_repeated(
    site: Site, store: JobStore, job_id: str, number: int
) -> None:
    run_job(store, job_id)
    everything = read(site.url, job_id)
    seen = everything[number].id
    for found in (
        read(site.url, job_id, after=seen),
        read(site.url, job_id, last_event_id=seen),
        # A browser that reconnects keeps the URL it had; the id in its header is newer.
        read(site.url, job_id, after=seen, last_event_id="0-0"),
    ):
        assert found == everything[number + 1 :]


@pytest.mark.parametrize("beyond", [False, True])
def test_after_the_last_event_there_is_nothing_more(
    client: TestClient, store: JobStore, redis: Redis, job_id: str, beyond: bool
) -> None:
    run_job(store, job_id)
    last = events.decode(redis.xrange(redis_keys.events(job_id)))[-1].event_id
    seen = "9999999999999999999-0" if beyond else last
    for answer in (
        client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": seen}),
        client.get(f"/jobs/{job_id}/events", params={"last_event_id": seen}),
    ):
        assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("where", ["Last-Event-ID", "last_event_id"])
@pytest.mark.parametrize("text", ["x", "1", "1-", "-1-0", "1-0\t2", "1" * 20 + "-0", "", "$", "+"])
def test_an_id_that_is_none_is_refused(
    client: TestClient, job_id: str, where: str, text: str
) -> None:
    sent = {"headers" if where == "Last-Event-ID" else "params": {where: text}}
    answer = client.get(f"/jobs/{job_id}/events", **sent)  # type: ignore[arg-type]
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    (error,) = answer.json()["errors"]
    assert (error["field"], error["bound"]) == (where, "the id of an event, like 1795360456040-0")


@pytest.mark.parametrize("name", ["nope", "%2e%2e", "x" * 300])
def test_an_unknown_job_has_no_events(client: TestClient, name: str) -> None:
    answer = client.get(f"/jobs/{name}/events")
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_a_stream_without_events_shows_that_it_is_alive(site: Site, job_id: str) -> None:
    with stream(site.url, job_id) as (_, sent):
        comments = [each for each in (next(sent) for _ in range(8)) if each.comments]
    assert len(comments) >= 3


def test_a_queued_job_gets_its_position_whenever_that_changes(
    site: Site,
    store: JobStore,
    redis: Redis,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    durations.measure(redis, request_for_video, Durations(step_s=2.0, rest_s=5.0))
    first, second = (store.create(request_for_video, live_worker.queue).job for _ in range(2))
    source = EventSource([site.url], second.id)
    source.start()
    wait_until(lambda: source.queue == [{"position": 1, "starts_in_s": 45.0}])
    redis.lpop(Queue(live_worker.queue, connection=redis).key)
    attempt = store.claim(first.id, "w")
    step(store, attempt, 1)
    # It counts as running as soon as a worker takes it: the second is behind it all the time.
    wait_until(lambda: source.queue[-1] == {"position": 1, "starts_in_s": 3.5})
    assert {each["position"] for each in source.queue} == {1}
    redis.lpop(Queue(live_worker.queue, connection=redis).key)
    run_job(store, second.id)
    assert [each.kind_and_state for each in source.finish()] == LIFE
    # Just before it starts it may be told so.
    assert source.queue[-1]["position"] in (0, 1)


def test_a_released_job_has_a_position_again(
    site: Site, store: JobStore, redis: Redis, job_id: str
) -> None:
    redis.lpop(Queue("q", connection=redis).key)
    attempt = store.claim(job_id, "w")
    source = EventSource([site.url], job_id)
    source.start()
    wait_until(lambda: len(source.sent) == 2)
    assert source.queue == []
    store.release(attempt)
    wait_until(lambda: bool(source.queue))
    assert source.queue == [{"position": 0, "starts_in_s": None}]
    store.cancel(job_id)
    assert [each.data["state"] for each in source.finish()] == [
        "queued",
        "running",
        "queued",
        "cancelled",
    ]


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_a_stream_ends_when_its_job_is_deleted(
    settings: ServiceSettings, store: JobStore, redis: Redis, job_id: str, state: JobState
) -> None:
    attempt = store.claim(job_id, "w") if state is JobState.RUNNING else None
    # At once, and not with the next heartbeat.
    with (
        serving(settings.model_copy(update={"heartbeat_s": 300})) as site,
        stream(site.url, job_id) as (_, sent),
    ):
        assert next(sent).retry
        assert next(each for each in sent if each.event == "state").data["state"] == "queued"
        # Past the subscription's beginning, which wakes all streams: only the deletion can now.
        wait_until(lambda: redis.pubsub_numsub(redis_keys.EVENTS_CHANNEL)[0][1] == 1)
        redis.publish(redis_keys.EVENTS_CHANNEL, job_id)
        wait_until(lambda: not site.hub._due)
        if attempt is not None:  # the end of its lease would end the job, and so the stream
            store.renew(attempt)
        store.purge(job_id)
        wait_until(lambda: site.hub.followers == 0, LEASE_S / 2)
        rest = list(sent)
    assert [each.data["state"] for each in rest if each.event == "state"] in ([], ["running"])
    assert not any(each.comments for each in rest)


def test_a_stream_asks_again_soon_after_redis_refused_to_answer(
    settings: ServiceSettings, store: JobStore, redis: Redis, job_id: str
) -> None:
    """The subscription lives on, so nothing but the stream's own retry brings the event."""
    attempt = store.claim(job_id, "w")
    with (
        serving(settings.model_copy(update={"heartbeat_s": 300})) as site,
        stream(site.url, job_id) as (_, sent),
    ):
        assert next(each for each in sent if each.event).data["state"] == "queued"
        assert next(each for each in sent if each.event).data["state"] == "running"
        wait_until(lambda: redis.pubsub_numsub(redis_keys.EVENTS_CHANNEL)[0][1] == 1)
        redis.acl_log_reset()
        redis.execute_command("ACL SETUSER default -xrange")
        try:
            store.fail(attempt, FAILURE)  # one event, so the stream is woken once
            wait_until(lambda: any(each["object"] == "xrange" for each in redis.acl_log()))
        finally:
            redis.execute_command("ACL SETUSER default +xrange")
        assert [each.data["state"] for each in sent if each.event] == ["failed"]


def test_no_more_streams_than_allowed(
    settings: ServiceSettings, store: JobStore, job_id: str
) -> None:
    with (
        serving(settings.model_copy(update={"max_streams": 2})) as site,
        stream(site.url, job_id) as (_, sent),
    ):
        assert next(sent).retry
        with stream(site.url, job_id) as (_, other):
            assert next(other).retry
            with stream(site.url, job_id) as (refused, _):
                problem = httpx2.Response(200, content=refused.read()).json()
            assert (refused.status_code, problem["code"]) == (503, "too_many_streams")
            assert refused.headers["retry-after"] == "5"
            assert "2 event streams" in problem["detail"]
        wait_until(lambda: site.hub.followers == 1)
        with stream(site.url, job_id) as (_, third):
            assert next(third).retry
        store.cancel(job_id)
        assert [each.kind_and_state for each in sent if each.event != "queue" and each.event][
            -1
        ] == (
            "state",
            "cancelled",
        )


def test_one_key_alone_leaves_room_for_others(
    settings: ServiceSettings, make_key: MakeKey, make_job: MakeJob
) -> None:
    alice, bob, ops = make_key("alice"), make_key("bob"), make_key("op", Role.OPS)
    hers, his = make_job("alice"), make_job("bob")
    with (
        serving(settings.model_copy(update={"max_streams": 30})) as site,
        httpx2.Client(base_url=site.url, trust_env=False) as client,
        ExitStack() as opened,
    ):

        def follow(job: JobRecord, key: dict[str, str]) -> httpx2.Response:
            path = f"/jobs/{job.id}/events"
            return opened.enter_context(client.stream("GET", path, headers=key))

        for _ in range(SMALLEST_SHARE):
            assert follow(hers, alice).status_code == 200
        refused = follow(hers, alice)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        assert b"You have 10 event streams open" in refused.read()
        assert follow(his, bob).status_code == 200
        for _ in range(SMALLEST_SHARE + 1):
            assert follow(hers, ops).status_code == 200
        opened.close()
        wait_until(lambda: site.hub.followers == 0)
        assert follow(hers, alice).status_code == 200


def test_clients_that_vanish_leave_nothing_behind(site: Site, store: JobStore, job_id: str) -> None:
    for _ in range(3):
        opened = [stream(site.url, job_id) for _ in range(50)]
        # Referenced, because a stream that is garbage collected closes itself.
        reading = [each.__enter__()[1] for each in opened]
        assert all(next(sent).retry for sent in reading)
        assert site.hub.followers == 50
        for number, each in enumerate(opened):
            if number % 10 == 0:
                # So that some disconnect while events are being sent to them.
                store.release(store.claim(job_id, "w"))
            each.__exit__(None, None, None)
        wait_until(lambda: site.hub.followers == 0)
    store.cancel(job_id)
    assert [each.kind_and_state for each in read(site.url, job_id)][-1] == ("state", "cancelled")


def test_a_hundred_streams_at_once(
    site: Site, store: JobStore, request_for_video: GenerationRequest
) -> None:
    jobs = [store.create(request_for_video, "q").job.id for _ in range(20)]
    sources = [EventSource([site.url], job_id) for job_id in jobs for _ in range(5)]
    for source in sources:
        source.start()
    wait_until(lambda: all(source.sent for source in sources), 60)
    assert site.hub.followers == 100
    writers = [threading.Thread(target=run_job, args=(store, job_id)) for job_id in jobs]
    for writer in writers:
        writer.start()
    for source in sources:
        assert [each.kind_and_state for each in source.finish(60)] == LIFE
    wait_until(lambda: site.hub.followers == 0)


class Hasty(EventStream):
    send_s = 0.1


def test_a_client_that_takes_nothing_is_left(
    site: Site, store: JobStore, job_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = store.get(job_id)
    view: Any = None  # asked for at the job's end only
    sizes = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sizes.append(site.hub.followers)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def follow() -> None:
        answer = Hasty(site.hub, Follower(job), events.START, 15, view)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(answer(scope, receive, send), 10)

    asyncio.run(follow())
    assert sizes == [1, 1]
    assert site.hub.followers == 0
    assert "takes nothing any more" in caplog.text


def test_a_cut_connection_costs_nothing(site: Site, store: JobStore, job_id: str) -> None:
    source = EventSource([site.url], job_id, cut_after=1)
    source.start()
    run_job(store, job_id)
    found = source.finish()
    assert [each.kind_and_state for each in found] == LIFE
    assert len({each.id for each in found}) == len(found)
    assert source.connections == len(LIFE) + 1


def test_sent_is_what_the_standard_says(client: TestClient, store: JobStore, job_id: str) -> None:
    run_job(store, job_id)
    text = client.get(f"/jobs/{job_id}/events").text
    assert text.startswith("retry: 2000\n\n")
    assert text.endswith("\n\n")
    assert Sent().event == ""
    for block in text.rstrip("\n").split("\n\n")[1:]:
        assert [line.partition(": ")[0] for line in block.split("\n")] == ["event", "data", "id"]


def test_a_message_that_is_no_id_harms_nobody(
    site: Site, store: JobStore, redis: Redis, job_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = EventSource([site.url], job_id)
    source.start()
    wait_until(lambda: bool(source.sent))
    redis.publish(redis_keys.EVENTS_CHANNEL, b"\xff")
    run_job(store, job_id)
    assert [each.kind_and_state for each in source.finish()] == LIFE
    assert "unexpected" not in caplog.text


def test_nobody_listens_for_nobody_and_the_next_stream_is_woken_again(
    settings: ServiceSettings,
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
) -> None:
    def listeners() -> int:
        return int(redis.pubsub_numsub(redis_keys.EVENTS_CHANNEL)[0][1])

    # No heartbeat makes the streams read: new events must be noticed by the subscription.
    with serving(settings.model_copy(update={"heartbeat_s": 120})) as site:
        for _ in range(2):
            job_id = store.create(request_for_video, "q").job.id
            assert listeners() == 0
            source = EventSource([site.url], job_id)
            source.start()
            wait_until(lambda: listeners() == 1)
            run_job(store, job_id)
            assert [each.kind_and_state for each in source.finish()] == LIFE
            wait_until(lambda: site.hub.followers == 0)
            redis.publish(redis_keys.EVENTS_CHANNEL, job_id)
            wait_until(lambda: listeners() == 0)


def test_an_unexpected_error_ends_no_task_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "AFTER_FAULT_S", 0.01)
    begun: list[int] = []

    async def work() -> None:
        begun.append(len(begun))
        if len(begun) < 3:
            raise ValueError("not foreseen")
        await asyncio.Event().wait()

    async def watch() -> None:
        task = asyncio.create_task(hub.keep_doing(work))
        while len(begun) < 3:
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(watch(), 10))
    assert [each.message for each in caplog.records] == [
        "Following events met an unexpected error, and goes on."
    ] * 2


def test_a_body_without_end_beside_a_stream_ends_it_quietly(
    site: Site, job_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(site.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        head = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n"
        caller.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        assert caller.recv(1000).startswith(b"HTTP/1.1 200")
        with suppress(OSError):  # the connection may be closed before all is sent
            for _ in range(MAX_BODY_BYTES // 0x4000 + 4):
                caller.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        wait_until(lambda: site.hub.followers == 0)
    # uvicorn notes in one line that the answer is not complete, and closes the connection.
    assert [each.message for each in caplog.records if each.exc_info] == []
