"""Test what ends a job at its next check, and what a report does to the threads of its job."""

import threading
import time
from collections.abc import Iterator

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.durations import Durations
from jobs.errors import GenerationCancelled, GenerationTimedOut, StaleAttempt
from jobs.record import Attempt, Progress, Stage
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from tests.support.requests import generation_request
from worker.job.lease import LeaseKeeper
from worker.job.progress import FINISH_S, JobClock, JobProgress, JobReturned, JobThreads
from worker.job.watchdog import Watchdog
from worker.process.drain import SAME_REQUEST_S, CurrentJob, Drain
from worker.process.redis_retry import RedisOutage
from worker.process.stats import StepTimes
from worker.settings import StallLimits


class JobUnderTest:
    """A `JobProgress` with everything it needs."""

    def __init__(self, store: JobStore, attempt: Attempt, deadline_s: float = 60) -> None:
        self.drain = Drain()
        self.job = CurrentJob(attempt.job_id)
        self.lease = LeaseKeeper(store, attempt, RedisOutage())
        self.watchdog = Watchdog(60, lambda: None)
        clock = JobClock(
            generation_request(), Durations(step_s=2, rest_s=10), StepTimes(), StallLimits()
        )
        stop_sources = (self.drain, self.job)
        self.control = JobProgress(
            JobThreads(self.lease, self.watchdog), clock, stop_sources, deadline_s
        )


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(generation_request(), "queue").job.id, "w")


@pytest.fixture
def job(store: JobStore, attempt: Attempt) -> Iterator[JobUnderTest]:
    job = JobUnderTest(store, attempt)
    with job.lease:
        yield job


def check_until_it_raises(control: JobProgress, limit_s: float = 5) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        control.check()
        time.sleep(0.005)


def test_progress_reaches_the_record_with_the_seconds_that_are_left(
    job: JobUnderTest, store: JobStore, attempt: Attempt
) -> None:
    job.control.progress(Stage.DENOISE, 0, 4)
    wait_until(lambda: store.get(attempt.job_id).progress is not None)
    progress = store.get(attempt.job_id).progress
    assert progress is not None
    assert progress.model_copy(update={"seconds_left": None}) == Progress(
        stage=Stage.DENOISE, step=0, steps=4
    )
    assert progress.seconds_left == pytest.approx(4 * 2 + 10, abs=1)


def test_a_cancel_is_raised(job: JobUnderTest, store: JobStore, attempt: Attempt) -> None:
    job.control.check()
    store.cancel(attempt.job_id)
    with pytest.raises(GenerationCancelled):
        check_until_it_raises(job.control)
    with pytest.raises(GenerationCancelled):  # again, in case the first was swallowed
        job.control.check()


def test_rqs_stop_command_takes_effect_at_once(job: JobUnderTest) -> None:
    job.control.check()
    job.job.stop = True
    with pytest.raises(GenerationCancelled):
        job.control.check()


def test_a_newer_attempt_ends_this_one(
    job: JobUnderTest, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    redis.hset(redis_keys.record(attempt.job_id), "lease_ms", 1)
    assert Recovery(redis).run() == {attempt.job_id: "queued"}
    store.claim(attempt.job_id, "other")
    with pytest.raises(StaleAttempt):
        check_until_it_raises(job.control)


def test_the_deadline_ends_it(store: JobStore, attempt: Attempt) -> None:
    job = JobUnderTest(store, attempt, deadline_s=0.05)
    job.control.check()
    with pytest.raises(GenerationTimedOut, match="time limit of 0 s"):
        check_until_it_raises(job.control)


def test_a_worker_that_finishes_returns_its_job_only_at_a_second_request(
    job: JobUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("worker.process.drain.time.monotonic", lambda: clock[0])
    job.drain.request_stop()
    job.control.check()
    clock[0] += SAME_REQUEST_S / 2
    job.drain.request_stop()  # the same request, sent by both a terminal and a launcher
    job.control.check()
    clock[0] += SAME_REQUEST_S
    job.drain.request_stop()
    with pytest.raises(JobReturned):
        job.control.check()


def test_a_worker_that_requeues_returns_its_job_at_once(job: JobUnderTest) -> None:
    drain = Drain("requeue")
    drain.request_stop()
    assert drain.stopping
    assert drain.return_job


def test_each_check_is_a_sign_of_life_and_each_step_sets_the_limit(job: JobUnderTest) -> None:
    """The watchdog measures by what the job reports; without it every long job would be ended."""
    limits = StallLimits()

    def told() -> tuple[int, float]:
        return job.watchdog._alive_count, job.watchdog._limit_s

    job.control.check()
    assert told() == (1, 60)
    job.control.progress(Stage.DENOISE, 0, 4)
    assert told() == (2, limits.first_step_s)  # no step was measured yet
    job.control.progress(Stage.DENOISE, 1, 4)
    assert told() == (3, limits.floor_s)  # one was, and took next to no time
    job.control.progress(Stage.DENOISE, 4, 4)
    assert told() == (4, FINISH_S)


def test_no_check_uses_redis(job: JobUnderTest, redis: Redis) -> None:
    job.lease.__exit__(None, None, None)
    before = int(redis.info("stats")["total_commands_processed"])
    for _ in range(1000):
        job.control.check()
    assert int(redis.info("stats")["total_commands_processed"]) - before == 1
    assert not any(thread.name == "lease" for thread in threading.enumerate())
