"""Test the positions of waiting jobs and the estimates of their starts."""

import pytest
from redis import Redis
from rq import Queue

from jobs import durations
from jobs.durations import DurationCache, Durations
from jobs.record import JobRecord, Progress, Stage
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.queue_positions import QueuePosition, QueuePositions
from jobs.store.submission import Submission

QUEUE = "q"
DURATIONS = Durations(step_s=2.0, rest_s=4.0, text_encoding_s=1.0)
JOB_S = DURATIONS.job_s(20)


@pytest.fixture
def jobs(store: JobStore, request_for_video: GenerationRequest) -> list[JobRecord]:
    return [store.create(request_for_video, QUEUE).job for _ in range(6)]


def position(redis: Redis, job: JobRecord, workers: int) -> QueuePosition | None:
    return QueuePositions(redis).of([job], {QUEUE: workers}).get(job.id)


def test_a_start_is_not_known_before_anything_was_measured(
    redis: Redis, jobs: list[JobRecord]
) -> None:
    assert position(redis, jobs[2], workers=1) == QueuePosition(2, None)
    assert position(redis, jobs[0], workers=1) == QueuePosition(0, 0)


def test_each_job_goes_to_the_worker_that_is_free_first(
    redis: Redis, jobs: list[JobRecord], request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    assert position(redis, jobs[2], workers=1) == QueuePosition(2, 2 * JOB_S)
    assert position(redis, jobs[2], workers=2) == QueuePosition(2, JOB_S)
    assert position(redis, jobs[2], workers=3) == QueuePosition(2, 0)
    assert position(redis, jobs[2], workers=0) == QueuePosition(2, None)


def test_running_jobs_count_with_the_seconds_they_have_left(
    redis: Redis, store: JobStore, jobs: list[JobRecord], request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    redis.lpop(Queue(QUEUE, connection=redis).key)
    attempt = store.claim(jobs[0].id, "w")
    first = position(redis, jobs[2], workers=1)
    assert first is not None
    assert first.starts_in_s == pytest.approx(2 * JOB_S, abs=5)
    store.progress(attempt, Progress(stage=Stage.VAE, step=1, steps=2, seconds_left=4.0))
    assert position(redis, jobs[2], workers=1) == QueuePosition(2, 4 + JOB_S)
    assert position(redis, jobs[2], workers=0) == QueuePosition(2, None)
    assert position(redis, store.get(jobs[0].id), workers=1) is None
    # The record was read before a worker took the job.
    assert position(redis, jobs[0], workers=1) == QueuePosition(0, 0)


def test_the_second_of_two_is_behind_the_first_at_every_moment(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    """The estimate is cached for the first; the second comes within the second it is cached."""
    durations.measure(redis, request_for_video, DURATIONS)
    positions = QueuePositions(redis)
    first = store.create(request_for_video, QUEUE)
    assert positions.at(QUEUE, first.position or 0, workers=1) == QueuePosition(0, 0)
    redis.lpop(Queue(QUEUE, connection=redis).key)  # a worker takes it, and has not claimed it yet
    second = store.create(request_for_video, QUEUE)
    assert second.position == 0
    assert positions.at(QUEUE, 0, workers=1) == QueuePosition(1, JOB_S)
    assert positions.of([second.job], {QUEUE: 1}) == {second.job.id: QueuePosition(1, JOB_S)}
    assert positions.of([first.job], {QUEUE: 1}) == {first.job.id: QueuePosition(0, 0)}
    attempt = store.claim(first.job.id, "w")
    store.progress(attempt, Progress(stage=Stage.VAE, step=1, steps=2, seconds_left=22.0))
    assert QueuePositions(redis).at(QUEUE, 0, workers=1) == QueuePosition(1, 22)
    store.cancelled(attempt)
    assert positions.at(QUEUE, 0, workers=1) == QueuePosition(0, 0)


def test_what_runs_in_another_queue_does_not_count(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    other = store.create(request_for_video, "other").job
    redis.lpop(Queue("other", connection=redis).key)
    job = store.create(request_for_video, QUEUE).job
    assert position(redis, job, workers=1) == QueuePosition(0, 0)
    store.claim(other.id, "w")
    assert position(redis, job, workers=1) == QueuePosition(0, 0)


def test_many_jobs_of_several_queues_at_once(
    redis: Redis, store: JobStore, jobs: list[JobRecord], request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    other = store.create(request_for_video, "other").job
    store.cancel(jobs[1].id)
    asked = [*(store.get(job.id) for job in reversed(jobs)), other]
    assert QueuePositions(redis).of(asked, {QUEUE: 1}) == {
        jobs[0].id: QueuePosition(0, 0),
        **{job.id: QueuePosition(n, n * JOB_S) for n, job in enumerate(jobs[2:], start=1)},
        other.id: QueuePosition(0, None),
    }
    assert QueuePositions(redis).of([], {}) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_far_behind_the_mean_of_those_in_front_is_taken(
    redis: Redis, jobs: list[JobRecord], request_for_video: GenerationRequest, workers: int
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    asked = QueuePositions(redis, 2).of(jobs, {QUEUE: workers})
    exact = QueuePositions(redis, 100).of(jobs, {QUEUE: workers})
    assert [asked[job.id].position for job in jobs] == list(range(6))
    assert asked[jobs[2].id] == exact[jobs[2].id]
    for job in jobs:
        estimate, truth = asked[job.id].starts_in_s, exact[job.id].starts_in_s
        assert estimate == pytest.approx(truth, abs=JOB_S / 2)


def test_behind_a_kind_never_measured_nothing_is_known(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    unmeasured = request_for_video.model_copy(update={"mode": "w8a8"})
    known, unknown, behind = (
        store.create(request, QUEUE).job
        for request in (request_for_video, unmeasured, request_for_video)
    )
    found = QueuePositions(redis).of([known, unknown, behind], {QUEUE: 1})
    assert [found[job.id].starts_in_s for job in (known, unknown, behind)] == [0, JOB_S, None]


def test_priority_goes_first(
    redis: Redis,
    store: JobStore,
    jobs: list[JobRecord],
    request_for_video: GenerationRequest,
) -> None:
    first = store.create(request_for_video, QUEUE, Submission(priority=True)).job
    assert position(redis, first, workers=1) == QueuePosition(0, 0)
    assert position(redis, jobs[0], workers=1) == QueuePosition(1, None)


def test_durations_follow_new_measurements_slowly(
    redis: Redis, request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, Durations(1.0, 10.0, 5.0))
    durations.measure(redis, request_for_video, Durations(2.0, 10.0, 0.0))
    kept = durations.read(redis, request_for_video)
    assert kept is not None
    assert kept.step_s == pytest.approx(1.3)
    assert kept.text_encoding_s == pytest.approx(3.5)
    assert kept.job_s(10) == pytest.approx(26.5)
    unguided = request_for_video.model_copy(update={"guidance_scale": 1.0})
    assert durations.read(redis, unguided) is None


def test_durations_are_cached(redis: Redis, request_for_video: GenerationRequest) -> None:
    cache = DurationCache(redis)
    durations.measure(redis, request_for_video, DURATIONS)
    assert cache.of(request_for_video) == DURATIONS
    durations.measure(redis, request_for_video, Durations(4.0, 5.0))
    assert cache.of(request_for_video) == DURATIONS
    assert DurationCache(redis).of(request_for_video) != DURATIONS


def test_the_estimate_of_a_queue_is_cached_and_the_position_is_not(
    redis: Redis, jobs: list[JobRecord], request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, DURATIONS)
    positions = QueuePositions(redis, cache_s=60)
    assert positions.of([jobs[1]], {QUEUE: 1})[jobs[1].id] == QueuePosition(1, JOB_S)
    durations.measure(redis, request_for_video, Durations(1.0, 1.0))
    assert positions.of([jobs[1]], {QUEUE: 1})[jobs[1].id] == QueuePosition(1, JOB_S)
    JobStore(redis).cancel(jobs[0].id)
    assert positions.of([jobs[1]], {QUEUE: 1})[jobs[1].id] == QueuePosition(0, 0)
    # The cached estimate does not cover this position, so a new one is made.
    found = positions.of([jobs[5]], {QUEUE: 1})[jobs[5].id]
    assert found.position == 4
    assert found.starts_in_s is not None
    assert found.starts_in_s < 4 * JOB_S
