"""Test the scheduler: tasks go on after errors, which are logged once, and end with the process."""

import logging
import threading
import time

import pytest
from fastapi.testclient import TestClient
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from service.app import create_app
from service.maintenance.scheduler import Scheduler, Task
from service.settings import ServiceSettings

PATIENCE_S = 20.0


class Faulty:
    """Work that raises the given errors in its next rounds, and counts all its rounds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.rounds = 0

    def __call__(self, ending: threading.Event) -> None:
        self.rounds += 1
        if self.errors:
            raise self.errors.pop(0)


def run_rounds(work: Faulty, rounds: int) -> None:
    scheduler = Scheduler([Task("sweeping", 0.01, work)])
    scheduler.start()
    try:
        wait_until(lambda: work.rounds >= rounds)
    finally:
        scheduler.stop()


def test_a_task_goes_on_after_any_fault(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="service.maintenance.scheduler"):
        run_rounds(Faulty(RedisConnectionError("no route"), ValueError("a mistake of ours")), 4)

    assert [record.getMessage() for record in caplog.records] == [
        "sweeping fails, and is tried again: ConnectionError: no route",
        "sweeping fails, and is tried again: ValueError: a mistake of ours",
        "sweeping works again",
    ]
    traces = [record.exc_info for record in caplog.records]
    assert traces[0] is None, "Redis being away is no surprise and needs no traceback"
    assert traces[1] is not None


def test_a_lasting_fault_is_logged_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="service.maintenance.scheduler"):
        run_rounds(Faulty(*(RedisConnectionError(f"port {n}") for n in range(5))), 6)

    assert [record.getMessage() for record in caplog.records] == [
        "sweeping fails, and is tried again: ConnectionError: port 0",
        "sweeping works again",
    ]


def test_a_failing_task_backs_off():
    work = Faulty(*(RedisConnectionError("away") for _ in range(1000)))
    scheduler = Scheduler([Task("sweeping", 0.1, work)])
    scheduler.start()
    time.sleep(1.0)
    scheduler.stop()

    # 0, 0.1, 0.3, 0.7 s, each a tenth off at most; without a back-off there are ten.
    assert 2 <= work.rounds <= 5


def test_stopping_waits_neither_for_the_next_round_nor_for_one_that_hangs():
    began = threading.Event()
    release = threading.Event()

    def hang(ending: threading.Event) -> None:
        began.set()
        release.wait()

    scheduler = Scheduler([Task("idle", 3600, Faulty()), Task("hanging", 3600, hang)])
    scheduler.start()
    assert began.wait(PATIENCE_S)
    asked_at = time.monotonic()
    scheduler.stop()
    assert time.monotonic() - asked_at < 5
    release.set()


def test_long_work_learns_that_the_process_ends():
    seen = threading.Event()

    def long(ending: threading.Event) -> None:
        if ending.wait(PATIENCE_S):
            seen.set()

    scheduler = Scheduler([Task("long", 3600, long)])
    scheduler.start()
    scheduler.stop()
    assert seen.is_set()


def test_a_service_process_puts_abandoned_jobs_back(
    settings: ServiceSettings,
    store: JobStore,
    redis: Redis,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
):
    job = store.create(request_for_video, live_worker.queue).job
    store.claim(job.id, "a worker that is gone")
    redis.hset(redis_keys.record(job.id), "lease_ms", 0)

    with TestClient(create_app(settings)):
        wait_until(lambda: store.get(job.id).state is JobState.QUEUED)

    assert store.get(job.id).lost == 1


def test_the_tasks_end_with_the_application(settings: ServiceSettings):
    with TestClient(create_app(settings)):
        assert any(thread.name == "scheduler-recovery" for thread in threading.enumerate())
    assert not any(thread.name.startswith("scheduler-") for thread in threading.enumerate())
