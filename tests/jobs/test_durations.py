"""Test that the time limit grows with the work and with what was measured."""

import pytest
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs import durations
from jobs.durations import DurationCache, Durations, timeout_s
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore


def test_limit_of_the_large_model(request_for_video: GenerationRequest) -> None:
    large = request_for_video.model_copy(
        update={"size": "832x480", "num_frames": 81, "num_inference_steps": 50}
    )
    # 32,760 tokens: 600 s + 50 x (5 s + 131.04 s).
    assert timeout_s(large) == 7402


def test_limit_grows_with_each_factor(request_for_video: GenerationRequest) -> None:
    base = timeout_s(request_for_video)
    for change in ({"size": "640x640"}, {"num_frames": 81}, {"num_inference_steps": 50}):
        assert timeout_s(request_for_video.model_copy(update=change)) > base


@pytest.mark.parametrize(
    ("measured", "limit"),
    [
        (Durations(step_s=0.001, rest_s=0.1), None),
        (Durations(step_s=60, rest_s=30), 10 * (20 * 60 + 30)),
        (Durations(step_s=0, rest_s=1000.01), 10_001),
    ],
)
def test_long_durations_raise_the_limit_and_short_ones_do_not_lower_it(
    request_for_video: GenerationRequest, measured: Durations, limit: int | None
) -> None:
    expected = timeout_s(request_for_video) if limit is None else limit
    assert timeout_s(request_for_video, measured) == expected


def test_the_limit_of_a_new_job_is_in_its_record_and_in_rqs_hash(
    redis: Redis, request_for_video: GenerationRequest
) -> None:
    durations.measure(redis, request_for_video, Durations(step_s=60, rest_s=30))
    store = JobStore(redis)
    job = store.create(request_for_video, "q").job
    assert store.get(job.id).deadline_s == job.deadline_s == 12_300
    attempt = store.claim(job.id, "w")
    durations.measure(redis, request_for_video, Durations(step_s=1, rest_s=1))
    store.give_up(attempt)
    rq_job = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert rq_job.timeout == 12_300


def test_what_is_cached_is_kept_for_a_while_and_bounded(
    redis: Redis, request_for_video: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durations, "MAX_CACHED", 3)
    shapes = [request_for_video.model_copy(update={"num_frames": 4 * n + 1}) for n in range(8)]
    cache = DurationCache(redis)
    for number, each in enumerate(shapes):
        durations.measure(redis, each, Durations(step_s=number, rest_s=1))
        assert cache.of(each) == Durations(step_s=number, rest_s=1)
        assert len(cache._cached) <= 3
    durations.measure(redis, shapes[-1], Durations(step_s=99, rest_s=1))
    assert cache.of(shapes[-1]) == Durations(step_s=7, rest_s=1)
