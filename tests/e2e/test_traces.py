"""Test the trace of a job whose first worker is killed, as a collector receives it.

A service and two workers are real processes, and the spans come by OTLP over HTTP. The caller has a
trace of its own, which goes on.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.store.job_store import JobStore
from tests.jobs.telemetry.otlp_receiver import Collector, Seen, collector
from tests.support.http_service import address, service
from tests.support.webhook_receiver import Receiver
from tests.support.worker_processes import (
    QUEUE,
    REQUEST,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)
from worker.errors import EXIT_HUNG

PROMPT = "xyzzy-nobody-may-read-this"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID, CALLER_SPAN = CALLER.split("-")[1:3]
STEPS = 6
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield found


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    processes = WorkerProcesses(redis_url, tmp_path)
    yield processes
    processes.stop()


def test_a_job_that_is_tried_again_is_one_trace(
    tracing: Collector, workers: WorkerProcesses, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    store = JobStore(redis)
    with Receiver().listening() as receiver:
        environment = {
            "REDIS_URL": redis_url,
            "ARTIFACTS_URL": workers.artifacts.as_uri(),
            "SERVICE_PORT": "0",
            "SERVICE_KEYS": "open",
            "SERVICE_PUBLIC_URL": "https://video.example.com",
            "SERVICE_WEBHOOK_HOSTS": f"127.0.0.1:{receiver.port}",
            "SERVICE_WEBHOOK_SECRET": SECRET,
            "SERVICE_WEBHOOK_HTTP": "1",
            "SERVICE_WEBHOOK_PRIVATE": "1",
            "LOG_FORMAT": "json",
        }
        with service(**environment) as front:
            first = workers.start(0.3, LOG_FORMAT="json")
            with httpx2.Client(base_url=address(front)) as client:
                wait_until(lambda: client.get("/readyz").status_code == 200)
                body = {
                    "prompt": PROMPT,
                    "num_inference_steps": STEPS,
                    "webhook_url": f"http://127.0.0.1:{receiver.port}/{PROMPT}",
                }
                headers = {"traceparent": CALLER, "tracestate": "congo=t61rcWkgMzE"}
                answer = client.post(f"/generate?prompt={PROMPT}", json=body, headers=headers)
                assert answer.status_code == 422, "the service knows no such parameter"
                answer = client.post("/generate", json=body, headers=headers)
                job_id = answer.json()["id"]
            wait_for(store, job_id, is_denoising)
            tracing.wait_for("text_encoder")
            first.kill()
            first.wait()
            redis.hset(redis_keys.record(job_id), "lease_ms", 1)  # as it will be soon
            second = workers.start(0.01, LOG_FORMAT="json")
            job = wait_for(store, job_id, has_ended)
            assert (job.state, job.attempts, job.lost) == ("succeeded", 2, 1)
            receiver.wait()
            second.send_signal(signal.SIGTERM)
            assert second.wait(20) == 0
            front.send_signal(signal.SIGTERM)
            assert front.wait(20) in (0, -signal.SIGTERM)
    check_trace(tracing, receiver, job_id)
    # The job's lines in the log are found by its trace.
    lines = [json.loads(line) for line in workers.log_text().splitlines()]
    assert {each["trace_id"] for each in lines if each.get("trace_id")} == {TRACE_ID}


def test_a_hung_worker_sends_the_span_of_its_attempt(
    tracing: Collector, workers: WorkerProcesses, redis: Redis
) -> None:
    """There is no context in the record: the service does not trace."""
    store = JobStore(redis)
    job_id = store.create(REQUEST, QUEUE).job.id
    first = workers.start(0.01, "hang", WORKER_STALL_FLOOR_S="1")
    assert first.wait(30) == EXIT_HUNG
    (hung,) = tracing.named("process")
    assert hung.failed
    assert (hung.attributes["wan.outcome"], hung.attributes["wan.attempt"]) == ("hung", 1)
    second = workers.start(0.01)
    wait_for(store, job_id, has_ended)
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0
    _, done = tracing.named("process")
    assert done.links == ((hung.trace_id, hung.span_id),)
    assert {span.trace_id for span in tracing.spans} == {hung.trace_id}
    assert [span.name for span in tracing.children("")] == [hung.name, done.name]


def check_trace(tracing: Collector, receiver: Receiver, job_id: str) -> None:
    spans = [span for span in tracing.spans if span.trace_id == TRACE_ID]
    assert len({span.span_id for span in spans}) == len(spans), tracing.tree()
    refused, request = tracing.children(CALLER_SPAN)
    assert refused.attributes["http.response.status_code"] == 422
    (sent,) = tracing.children(request.span_id)
    lost, done, webhook = tracing.children(sent.span_id)
    assert [span.kind for span in (request, sent, lost, done, webhook)] == [
        *("SERVER", "PRODUCER", "CONSUMER", "CONSUMER", "CLIENT")
    ]
    assert (request.name, request.service) == ("POST /generate", "wan-service")
    assert sent.attributes["messaging.message.id"] == job_id
    check_attempts(lost, done)
    assert [each.name for each in tracing.children(lost.span_id)] == ["text_encoder"]
    stages = tracing.children(done.span_id)
    assert [each.name for each in stages] == ["text_encoder", "denoise", "encode", "upload"]
    stages += tracing.children(stages[2].span_id)
    assert stages[-1].name == "vae"
    assert all(each.service == "wan-worker" for each in stages)
    assert not any(each.failed for each in (request, sent, done, webhook, *stages))
    assert stages[1].events == ("step",) * STEPS
    assert stages[1].attributes["wan.steps"] == STEPS
    assert webhook.attributes["http.response.status_code"] == 204
    (call,) = receiver.calls
    assert call.headers["traceparent"] == f"00-{TRACE_ID}-{webhook.span_id}-01"
    assert call.headers["tracestate"] == "congo=t61rcWkgMzE"
    # 6 of both attempts, and the two of the service with the webhook, and the refused request.
    assert len(spans) == 1 + 2 + 1 + 2 + 6, tracing.tree(CALLER_SPAN)
    assert not [span.name for span in tracing.spans if span not in spans], "polls are left out"
    assert not any(PROMPT.encode() in body for body in tracing.bodies)


def check_attempts(lost: Seen, done: Seen) -> None:
    assert lost.failed
    assert lost.attributes["error.type"] == "worker_lost"
    assert lost.attributes["wan.last_stage"] == "denoise"
    assert lost.attributes["wan.attempt"] == 1
    assert done.attributes["wan.attempt"] == 2
    assert done.attributes["wan.outcome"] == "succeeded"
    assert lost.attributes["wan.worker"] != done.attributes["wan.worker"]
    assert done.links == ((lost.trace_id, lost.span_id),)
    assert lost.begun_ns < lost.ended_ns <= done.begun_ns + 10**9
