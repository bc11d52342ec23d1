"""Progress goes out and the wish to stop comes in, both at a bearable rate."""

import threading
import time

import pytest
from redis import Redis

from jobs.errors import GenerationCancelled, StaleAttempt
from jobs.record import Attempt, Progress, Stage
from jobs.store import JobStore
from tests.worker.orders import order
from worker.watch import ASK_EVERY_S, TELL_EVERY_S, JobWatch


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(order(), "queue").job.id, "w")


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def watch(store: JobStore, attempt: Attempt, stop: threading.Event) -> JobWatch:
    return JobWatch(store, attempt, stop)


def commands(redis: Redis) -> int:
    return int(redis.info("stats")["total_commands_processed"])


def test_progress_reaches_the_record(watch: JobWatch, store: JobStore, attempt: Attempt) -> None:
    watch.progress(Stage.DENOISE, 0, 4)
    watch.progress(Stage.DENOISE, 4, 4)
    expected = Progress(stage=Stage.DENOISE, step=4, steps=4)
    assert store.get(attempt.job_id).progress == expected


def test_fast_steps_are_published_in_part_and_the_last_always(
    watch: JobWatch, store: JobStore, attempt: Attempt
) -> None:
    watch.progress(Stage.DENOISE, 0, 3)
    watch.progress(Stage.DENOISE, 1, 3)
    seen = store.get(attempt.job_id).progress
    assert seen is not None
    assert seen.step == 0
    time.sleep(TELL_EVERY_S)
    watch.progress(Stage.DENOISE, 2, 3)
    seen = store.get(attempt.job_id).progress
    assert seen is not None
    assert seen.step == 2


def test_a_thousand_checks_ask_redis_only_now_and_then(watch: JobWatch, redis: Redis) -> None:
    before, started = commands(redis), time.monotonic()
    for _ in range(1000):
        watch.check()
    asked = commands(redis) - before - 1
    assert asked <= 1 + (time.monotonic() - started) / ASK_EVERY_S


def test_a_cancel_is_seen_by_the_next_question(
    watch: JobWatch, store: JobStore, attempt: Attempt
) -> None:
    watch.check()
    store.cancel(attempt.job_id)
    time.sleep(ASK_EVERY_S)
    with pytest.raises(GenerationCancelled):
        watch.check()


def test_the_stop_event_is_seen_at_once(watch: JobWatch, stop: threading.Event) -> None:
    watch.check()
    stop.set()
    with pytest.raises(GenerationCancelled):
        watch.check()


def test_a_newer_attempt_ends_this_one(watch: JobWatch, store: JobStore, attempt: Attempt) -> None:
    store.claim(attempt.job_id, "w")
    with pytest.raises(StaleAttempt):
        watch.progress(Stage.VAE, 1, 1)
