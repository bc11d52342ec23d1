"""Rounds over comparisons: each half is submitted once, last of all, and noticed when it ends."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue

from jobs import catalog, redis_keys
from jobs.artifacts.known_store import open_known_artifacts
from jobs.catalog import WorkerOffer
from jobs.errors import ComparisonNotFound
from jobs.record import Attempt, Failure, JobRecord, now
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import Created, JobStore
from jobs.store.submission import Submission
from service.comparisons.model import (
    Arm,
    Comparison,
    ComparisonState,
    Half,
    HalfState,
    Pair,
    PairState,
)
from service.comparisons.orchestrator import UNSURE_AFTER, Orchestrator
from service.comparisons.pair_jobs import delete_comparison, retried
from service.comparisons.store import ComparisonStore
from tests.service.comparisons.samples import sample_comparison, sample_pairs

LOST = Failure(code="worker_lost", detail="It was lost.")


def jobs_of(store: JobStore, state: JobState | None = None) -> list[JobRecord]:
    return list(store.list(state, limit=200).jobs)


class Worker:
    """Takes jobs out of their queues, as RQ does, and ends them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._store = JobStore(redis)

    def claim(self, job_id: str) -> Attempt:
        queue = self._store.get(job_id).queue
        self._redis.lrem(Queue(queue, connection=self._redis).key, 0, job_id)
        return self._store.claim(job_id, "worker-1")

    def fail_all(self) -> None:
        """Let every queued job fail."""
        for job in jobs_of(self._store, JobState.QUEUED):
            self._store.fail(self.claim(job.id), LOST)


class Bench:
    """A comparison's surroundings: its stores, a worker, and rounds on demand."""

    def __init__(self, redis: Redis, folder: Path) -> None:
        self.redis = redis
        self.store = JobStore(redis)
        self.comparisons = ComparisonStore(redis)
        self.artifacts = open_known_artifacts((folder / "artifacts").as_uri(), redis)
        self.worker = Worker(redis)

    def make(self, prompts: int = 2, **changes: object) -> Comparison:
        comparison = sample_comparison(prompts, **changes)  # type: ignore[arg-type]
        self.comparisons.create(comparison, sample_pairs(comparison))
        return comparison

    def build(self, jobs: JobStore | None = None) -> Orchestrator:
        jobs = jobs or self.store
        return Orchestrator(self.redis, jobs, self.artifacts, lambda: catalog.read(self.redis))

    def run(self) -> None:
        """Run one round."""
        self.build().run(threading.Event())

    def jobs(self) -> list[JobRecord]:
        return jobs_of(self.store)

    def pairs(self, comparison: Comparison) -> tuple[Pair, ...]:
        return self.comparisons.pairs(comparison.id)

    def halves(self, comparison: Comparison) -> list[Half]:
        return [half for pair in self.pairs(comparison) for half in pair.halves]


@pytest.fixture
def bench(redis: Redis, tmp_path: Path) -> Bench:
    return Bench(redis, tmp_path)


def test_pairs_get_jobs_that_differ_in_nothing_but_the_mode(
    bench: Bench, live_worker: WorkerOffer
) -> None:
    made = bench.make(prompts=1, seeds=(2**63 - 1,))
    bench.run()
    (pair,) = bench.pairs(made)
    records = {arm: bench.store.get(str(pair.half(arm).job_id)) for arm in Arm}
    reference, candidate = records[Arm.REFERENCE], records[Arm.CANDIDATE]
    assert (reference.request.mode, candidate.request.mode) == ("bf16", "w8a8")
    assert reference.request == candidate.request.model_copy(update={"mode": "bf16"})
    assert reference.request.seed == 2**63 - 1
    for record in records.values():
        assert record.owner == "ops"
        assert record.metadata == {"comparison": made.id, "pair": pair.id}
        assert not record.priority
        assert record.queue == live_worker.queue
    assert pair.state is PairState.RUNNING


def test_one_job_more_than_there_are_workers_is_open_at_a_time(
    bench: Bench, offer: WorkerOffer
) -> None:
    catalog.publish(bench.redis, offer)
    catalog.publish(bench.redis, offer.model_copy(update={"worker_id": "worker-2"}))
    bench.make(prompts=4)
    bench.make(prompts=4)
    for _ in range(3):
        bench.run()
    assert len(bench.jobs()) == 3
    attempt = bench.worker.claim(bench.jobs()[0].id)
    bench.run()
    assert len(bench.jobs()) == 3
    bench.store.fail(attempt, LOST)
    bench.run()
    assert len(bench.jobs()) == 4


def test_nothing_is_submitted_while_a_job_of_others_waits(
    bench: Bench, live_worker: WorkerOffer, request_for_video: GenerationRequest
) -> None:
    other = bench.store.create(request_for_video, live_worker.queue).job
    made = bench.make()
    bench.run()
    assert [job.id for job in bench.jobs()] == [other.id]
    assert "Other jobs wait" in str(bench.comparisons.get(made.id).problem)
    bench.worker.claim(other.id)  # it runs, and no longer waits
    bench.run()
    assert len(bench.jobs()) == 3
    assert bench.comparisons.get(made.id).problem is None


def test_a_comparison_waits_for_a_worker_and_says_so(bench: Bench, offer: WorkerOffer) -> None:
    made = bench.make()
    bench.run()
    assert "No worker is live" in str(bench.comparisons.get(made.id).problem)
    only_bf16 = offer.model_copy(update={"modes": offer.modes[:1]})
    catalog.publish(bench.redis, offer)
    catalog.publish(bench.redis, only_bf16)
    bench.run()
    assert "No live worker serves mode w8a8" in str(bench.comparisons.get(made.id).problem)
    assert {job.request.mode for job in bench.jobs()} == {"bf16"}
    catalog.publish(bench.redis, offer)
    bench.worker.fail_all()
    bench.run()
    bench.run()
    assert bench.comparisons.get(made.id).problem is None
    assert {job.request.mode for job in bench.jobs()} == {"bf16", "w8a8"}


class DyingStore(JobStore):
    """The store of a process that is killed before or after the creation of a job."""

    before = True

    def create(
        self, request: GenerationRequest, queue: str, submission: Submission | None = None
    ) -> Created:
        if self.before:
            raise InterruptedError
        super().create(request, queue, submission)
        raise InterruptedError


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.usefixtures("live_worker")
def test_a_process_that_dies_while_it_submits_loses_and_doubles_nothing(
    bench: Bench, before: bool
) -> None:
    made = bench.make(prompts=1)
    dying = DyingStore(bench.redis)
    dying.before = before
    with pytest.raises(InterruptedError):
        bench.build(dying).run(threading.Event())
    assert len(bench.jobs()) == (0 if before else 1)
    assert [half.attempt for half in bench.halves(made)] == [1, 0]
    for _ in range(3):
        bench.run()
    assert len(bench.jobs()) == 2
    assert {half.job_id for half in bench.halves(made)} == {job.id for job in bench.jobs()}
    assert [half.attempt for half in bench.halves(made)] == [1, 1]


@pytest.mark.usefixtures("live_worker")
def test_rounds_at_once_submit_each_half_once(bench: Bench) -> None:
    """Without the lock, which only saves work: the rounds of four processes overlap."""
    made = [bench.make(prompts=5), bench.make(prompts=3)]
    names = [each.id for each in made]
    done = threading.Event()

    def repeat() -> None:
        orchestrator = bench.build()
        while not done.is_set():
            orchestrator.run_round(names, lambda: None)

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(repeat) for _ in range(4)]
        try:
            for _ in range(2000):
                bench.worker.fail_all()
                states = [half.state for each in made for half in bench.halves(each)]
                if set(states) == {HalfState.FAILED}:
                    break
        finally:
            done.set()
        for each in running:
            each.result()
    jobs = bench.jobs()
    assert len(jobs) == 2 * (5 + 3)
    pairs = Counter((job.metadata["pair"], job.request.mode) for job in jobs)
    assert set(pairs.values()) == {1}


def test_only_one_process_runs_a_round(bench: Bench) -> None:
    bench.make()
    with bench.redis.lock("wan:comparisons:lock", timeout=10):
        bench.run()
    assert bench.jobs() == []


@pytest.mark.usefixtures("live_worker")
def test_a_failed_half_is_made_again_on_demand_and_the_other_stays(bench: Bench) -> None:
    made = bench.make(prompts=1)
    bench.run()
    (pair,) = bench.pairs(made)
    bench.store.fail(bench.worker.claim(str(pair.reference.job_id)), LOST)
    for _ in range(3):
        bench.run()
    (pair,) = bench.pairs(made)
    assert pair.reference.failure == LOST
    assert pair.candidate.state is HalfState.QUEUED
    assert len(bench.jobs()) == 2

    bench.comparisons.update_pair(made.id, pair.id, retried)
    bench.run()
    (again,) = bench.pairs(made)
    assert again.candidate == pair.candidate
    assert again.reference.state is HalfState.QUEUED
    assert again.reference.attempt == 2
    assert again.reference.job_id != pair.reference.job_id
    repeated = bench.store.get(str(again.reference.job_id)).request
    assert repeated == bench.store.get(str(pair.reference.job_id)).request


@pytest.mark.usefixtures("live_worker")
def test_a_comparison_whose_halves_have_all_ended_is_left_alone_until_something_changes(
    bench: Bench,
) -> None:
    made = bench.make(prompts=1)
    bench.run()
    bench.worker.fail_all()
    bench.run()
    assert bench.comparisons.open_ids() == ()
    pair = bench.pairs(made)[0]
    assert pair.state is PairState.FAILED
    bench.comparisons.update_pair(made.id, pair.id, retried)
    assert bench.comparisons.open_ids() == (made.id,)
    bench.run()
    assert len(bench.jobs()) == 4


@pytest.mark.usefixtures("live_worker")
def test_the_other_half_of_a_failed_pair_is_still_made(bench: Bench, offer: WorkerOffer) -> None:
    made = bench.make(prompts=1)
    (pair,) = bench.pairs(made)
    failed = Half(state=HalfState.FAILED, attempt=1, failure=LOST)
    bench.comparisons.update_pair(
        made.id, pair.id, lambda found: found.with_half(Arm.REFERENCE, failed)
    )
    bench.run()  # no worker is live
    assert bench.comparisons.open_ids() == (made.id,)
    catalog.publish(bench.redis, offer)
    bench.run()
    assert [job.request.mode for job in bench.jobs()] == ["w8a8"]


@pytest.mark.usefixtures("live_worker")
def test_pause_submits_nothing_more_and_notices_what_ends(bench: Bench) -> None:
    made = bench.make(prompts=3)
    bench.run()
    bench.comparisons.change_state(made.id, ComparisonState.PAUSED, [ComparisonState.RUNNING])
    bench.worker.fail_all()
    bench.run()
    assert len(bench.jobs()) == 2
    states = Counter(half.state for half in bench.halves(made))
    assert states == {HalfState.FAILED: 2, HalfState.WAITING: 4}
    bench.comparisons.change_state(made.id, ComparisonState.RUNNING, [ComparisonState.PAUSED])
    bench.run()
    assert len(bench.jobs()) == 4


@pytest.mark.parametrize("to", [ComparisonState.CANCELLED, ComparisonState.CLOSED])
@pytest.mark.usefixtures("live_worker")
def test_the_end_of_a_comparison_cancels_its_jobs(bench: Bench, to: ComparisonState) -> None:
    made = bench.make(prompts=3)
    bench.run()
    running = bench.worker.claim(str(bench.halves(made)[0].job_id))
    bench.comparisons.change_state(made.id, to, [ComparisonState.RUNNING])
    bench.run()
    assert bench.store.renew(running)  # it is asked to stop
    assert bench.comparisons.open_ids() == (made.id,)
    bench.store.cancelled(running)
    bench.run()
    bench.run()
    assert bench.comparisons.open_ids() == ()
    assert {job.state for job in bench.jobs()} == {JobState.CANCELLED}
    assert len(bench.jobs()) == 2


@pytest.mark.usefixtures("live_worker")
def test_what_may_have_been_submitted_a_day_ago_is_not_submitted_again_by_itself(
    bench: Bench,
) -> None:
    made = bench.make(prompts=1)
    (pair,) = bench.pairs(made)

    def asked_long_ago(found: Pair) -> Pair:
        half = Half(attempt=1, asked_at=now() - UNSURE_AFTER - timedelta(seconds=1))
        return found.with_half(Arm.REFERENCE, half)

    bench.comparisons.update_pair(made.id, pair.id, asked_long_ago)
    bench.run()
    (pair,) = bench.pairs(made)
    assert pair.reference.failure is not None
    assert pair.reference.failure.code == "unsure"
    assert [job.request.mode for job in bench.jobs()] == ["w8a8"]
    bench.comparisons.update_pair(made.id, pair.id, retried)
    bench.run()
    assert {job.request.mode for job in bench.jobs()} == {"bf16", "w8a8"}


@pytest.mark.usefixtures("live_worker")
def test_a_job_that_was_deleted_is_a_failed_half(bench: Bench) -> None:
    made = bench.make(prompts=1)
    bench.run()
    bench.store.purge(str(bench.halves(made)[0].job_id))
    bench.run()
    failure = bench.halves(made)[0].failure
    assert failure is not None
    assert failure.code == "job_not_found"


def test_what_workers_no_longer_accept_is_a_failed_half(bench: Bench, offer: WorkerOffer) -> None:
    made = bench.make(prompts=1)
    short = offer.model.model_copy(update={"max_frames": 9, "default_frames": 9})
    catalog.publish(bench.redis, offer.model_copy(update={"model": short}))
    bench.run()
    assert [half.failure and half.failure.code for half in bench.halves(made)] == [
        "invalid_spec"
    ] * 2
    assert bench.jobs() == []


@pytest.mark.usefixtures("live_worker")
def test_a_job_of_a_comparison_that_is_deleted_meanwhile_does_not_run(bench: Bench) -> None:
    class DeletingStore(JobStore):
        def create(
            self, request: GenerationRequest, queue: str, submission: Submission | None = None
        ) -> Created:
            created = super().create(request, queue, submission)
            delete_comparison(bench.store, bench.comparisons, bench.artifacts, made.id)
            return created

    made = bench.make()
    bench.build(DeletingStore(bench.redis)).run(threading.Event())
    assert [job.state for job in bench.jobs()] == [JobState.CANCELLED]
    with pytest.raises(ComparisonNotFound):
        bench.comparisons.get(made.id)

    open_one = bench.make()
    bench.run()
    delete_comparison(bench.store, bench.comparisons, bench.artifacts, open_one.id)
    assert {job.state for job in bench.jobs()} == {JobState.CANCELLED}
    assert bench.comparisons.open_ids() == ()


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("part", ["pairs", "comparison", "state"])
def test_a_comparison_of_a_later_version_is_passed_over_and_others_go_on(
    part: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    later, known = bench.make(prompts=1), bench.make(prompts=1)
    if part == "pairs":
        key = redis_keys.comparison_part(later.id, "pairs")
        (pair,) = bench.pairs(later)
        bench.redis.hset(key, pair.id, pair.model_dump_json().replace("test", "later"))
    else:
        text = "later" if part == "state" else '{"later": true}'
        bench.redis.hset(redis_keys.comparison(later.id), part, text)
    rounds = bench.build()
    for _ in range(3):
        rounds.run(threading.Event())
    assert all(half.job_id for half in bench.halves(known))
    assert len(bench.jobs()) == 2
    (line,) = (each for each in caplog.messages if later.id in each)
    assert "stands still, others go on" in line
    assert "a later version of the service" in line
    listed = {each.id for each in bench.comparisons.list().comparisons}
    assert listed == ({known.id, later.id} if part == "pairs" else {known.id})
    delete_comparison(bench.store, bench.comparisons, bench.artifacts, later.id)
    assert not bench.comparisons.exists(later.id)
