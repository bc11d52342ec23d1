"""What ends a job at its next check, and what each report means for the threads beside it."""

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
from tests.support.requests import order
from worker.job.lease import LeaseKeeper
from worker.job.progress import GivenBack, JobClock, JobProgress
from worker.job.watchdog import Watchdog
from worker.process.drain import SAME_WISH_S, Drain, JobInHand
from worker.process.redis_retry import RedisOutage
from worker.process.stats import StepTimes
from worker.settings import StallLimits


class Site:
    """A watch with everything around it."""

    def __init__(self, store: JobStore, attempt: Attempt, deadline_s: float = 60) -> None:
        self.drain = Drain()
        self.job = JobInHand(attempt.job_id)
        self.lifeline = LeaseKeeper(store, attempt, RedisOutage())
        self.watchdog = Watchdog(60, lambda: None)
        clock = JobClock(order(), Durations(step_s=2, rest_s=10), StepTimes(), StallLimits())
        wishes = (self.drain, self.job)
        self.watch = JobProgress(self.lifeline, self.watchdog, clock, wishes, deadline_s)


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(order(), "queue").job.id, "w")


@pytest.fixture
def site(store: JobStore, attempt: Attempt) -> Iterator[Site]:
    site = Site(store, attempt)
    with site.lifeline:
        yield site


def check_until_it_raises(watch: JobProgress, limit_s: float = 5) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        watch.check()
        time.sleep(0.005)


def test_progress_reaches_the_record_with_the_seconds_that_are_left(
    site: Site, store: JobStore, attempt: Attempt
) -> None:
    site.watch.progress(Stage.DENOISE, 0, 4)
    wait_until(lambda: store.get(attempt.job_id).progress is not None)
    progress = store.get(attempt.job_id).progress
    assert progress is not None
    assert progress.model_copy(update={"seconds_left": None}) == Progress(
        stage=Stage.DENOISE, step=0, steps=4
    )
    assert progress.seconds_left == pytest.approx(4 * 2 + 10, abs=1)


def test_a_cancel_is_raised(site: Site, store: JobStore, attempt: Attempt) -> None:
    site.watch.check()
    store.cancel(attempt.job_id)
    with pytest.raises(GenerationCancelled):
        check_until_it_raises(site.watch)
    with pytest.raises(GenerationCancelled):  # for whoever has swallowed the first
        site.watch.check()


def test_rqs_wish_to_stop_is_seen_at_once(site: Site) -> None:
    site.watch.check()
    site.job.stop = True
    with pytest.raises(GenerationCancelled):
        site.watch.check()


def test_a_newer_attempt_ends_this_one(
    site: Site, redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    redis.hset(redis_keys.record(attempt.job_id), "lease_ms", 1)
    assert Recovery(redis).run() == {attempt.job_id: "queued"}
    store.claim(attempt.job_id, "other")
    with pytest.raises(StaleAttempt):
        check_until_it_raises(site.watch)


def test_the_deadline_ends_it(store: JobStore, attempt: Attempt) -> None:
    site = Site(store, attempt, deadline_s=0.05)
    site.watch.check()
    with pytest.raises(GenerationTimedOut, match="time limit of 0 s"):
        check_until_it_raises(site.watch)


def test_a_worker_that_finishes_gives_back_only_when_told_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("worker.process.drain.time.monotonic", lambda: clock[0])
    site.drain.tell()
    site.watch.check()
    clock[0] += SAME_WISH_S / 2
    site.drain.tell()  # the same wish, from a terminal and a launcher
    site.watch.check()
    clock[0] += SAME_WISH_S
    site.drain.tell()
    with pytest.raises(GivenBack):
        site.watch.check()


def test_a_worker_that_requeues_gives_back_at_once(site: Site) -> None:
    drain = Drain("requeue")
    drain.tell()
    assert drain.told
    assert drain.give_back


def test_no_check_ever_asks_redis(site: Site, redis: Redis) -> None:
    site.lifeline.__exit__(None, None, None)
    before = int(redis.info("stats")["total_commands_processed"])
    for _ in range(1000):
        site.watch.check()
    assert int(redis.info("stats")["total_commands_processed"]) - before == 1
    assert not any(thread.name == "lifeline" for thread in threading.enumerate())
