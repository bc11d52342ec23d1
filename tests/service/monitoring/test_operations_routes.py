"""Test what operators see and order: workers, waiting and running jobs, failures, series."""

import logging
from collections.abc import Callable
from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.record import Attempt, Failure, Progress, Stage, Video, now
from jobs.redis_client import server_time_s
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore, new_token
from jobs.store.submission import Submission
from jobs.store.workers import WorkerStatus, publish_status
from service.monitoring.series import read_series
from tests.service.conftest import TIMINGS

Claim = Callable[..., Attempt]

VIDEO = Video(key="k", bytes=1, sha256="0", width=96, height=96, num_frames=17, fps=8)


@pytest.fixture
def claim(store: JobStore, live_worker: WorkerOffer, request_for_video: GenerationRequest) -> Claim:
    """Make a job and claim it for the live worker."""

    def claim(owner: str = "alice", **changes: object) -> Attempt:
        request = request_for_video.model_copy(update=changes)
        job = store.create(request, live_worker.queue, Submission(owner=owner)).job
        return store.claim(job.id, live_worker.worker_id, new_token())

    return claim


def test_a_running_job_is_shown_with_its_worker(
    client: TestClient, redis: Redis, store: JobStore, live_worker: WorkerOffer, claim: Claim
) -> None:
    attempt = claim()
    progress = Progress(stage=Stage.DENOISE, step=4, steps=20, seconds_left=2.5)
    store.progress(attempt, progress)
    publish_status(
        redis,
        WorkerStatus(worker_id=live_worker.worker_id, state="busy", job_id=attempt.job_id),
    )
    (worker,) = client.get("/workers").json()["workers"]
    assert worker["seen_at"] is not None
    job = worker["job"]
    assert job.pop("started_at") is not None
    assert job == {
        "id": attempt.job_id,
        "owner": "alice",
        "attempts": 1,
        "progress": progress.model_dump(mode="json"),
        "shape": {
            "model": "wan-mini",
            "mode": "bf16",
            "size": "96x96",
            "num_frames": 17,
            "guided": True,
        },
    }


def test_waiting_jobs_are_grouped_by_shape_and_age(
    client: TestClient,
    store: JobStore,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    for mode, number in (("w8a8", 2), ("bf16", 1)):
        for _ in range(number):
            request = request_for_video.model_copy(update={"mode": mode})
            store.create(request, live_worker.queue)
    (queue,) = client.get("/workers").json()["queues"]
    assert queue["waiting"] == 3
    first, second = queue["shapes"]
    assert (first["mode"], first["waiting"], second["mode"], second["waiting"]) == (
        *("w8a8", 2),
        *("bf16", 1),
    )
    assert first["ages"] == {"under_1_min": 2, "under_10_min": 0, "under_1_h": 0, "over_1_h": 0}
    assert 0 <= second["oldest_age_s"] <= first["oldest_age_s"] < 60


def test_a_worker_is_drained_and_resumed(
    client: TestClient,
    redis: Redis,
    live_worker: WorkerOffer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = live_worker.worker_id
    publish_status(redis, WorkerStatus(worker_id=name, state="busy"))
    with caplog.at_level(logging.INFO, "service.audit"):
        answer = client.post(f"/workers/{name}/drain")
    assert answer.status_code == 202
    assert (answer.json()["state"], answer.json()["drain"]["by"]) == ("draining", "local")
    # What the worker then says of itself; it has withdrawn its offer.
    redis.delete(redis_keys.worker_offer(name))
    publish_status(redis, WorkerStatus(worker_id=name, state="drained", withheld=live_worker))
    (worker,) = client.get("/workers").json()["workers"]
    assert (worker["state"], worker["device"], worker["queue"]) == (
        *("drained", "cpu"),
        live_worker.queue,
    )
    assert set(worker["modes"]) == {"bf16", "w8a8"}
    assert 'wan_workers{model="wan-mini",state="drained"} 1.0' in client.get("/metrics").text
    assert client.get("/readyz").status_code == 503, "it takes nothing"
    assert client.post(f"/workers/{name}/resume").json()["drain"] is None
    assert f"ordered worker {name} to drain" in caplog.text


def test_only_live_workers_are_ordered(client: TestClient) -> None:
    for order in ("drain", "resume"):
        answer = client.post(f"/workers/gone/{order}")
        assert (answer.status_code, answer.json()["code"]) == (404, "worker_not_found")


def test_failures_are_listed_by_code_and_time_of_their_end(
    client: TestClient, redis: Redis, store: JobStore, claim: Claim
) -> None:
    assert client.get("/failures").json()["codes"] == []
    codes = ["out_of_device_memory", "out_of_device_memory", "generation_failed"]
    attempts = [claim() for _ in codes]
    for attempt, code in zip(attempts, codes, strict=True):
        store.fail(attempt, Failure(code=code, detail=f"because of {code}"))
    answer = client.get("/failures").json()
    assert answer["total"] == 3
    memory, other = answer["codes"]
    assert (memory["code"], memory["number"]) == ("out_of_device_memory", 2)
    assert [each["id"] for each in memory["jobs"]] == [attempts[1].job_id, attempts[0].job_id]
    (job,) = other["jobs"]
    assert (job["id"], job["detail"]) == (attempts[2].job_id, "because of generation_failed")
    assert (job["owner"], job["worker"], job["attempts"]) == ("alice", "worker-1", 1)
    # By the end, not the creation; and what is deleted is in no list.
    redis.zadd(redis_keys.FAILURES, {attempts[0].job_id: 1})
    store.purge(attempts[2].job_id)
    recent = client.get("/failures", params={"since": (now() - timedelta(hours=1)).isoformat()})
    (memory,) = recent.json()["codes"]
    assert [each["id"] for each in memory["jobs"]] == [attempts[1].job_id]
    assert client.get("/failures?since=yesterday").status_code == 422


def test_the_list_of_failures_is_bounded(store: JobStore, redis: Redis, claim: Claim) -> None:
    old = {f"old-{number}": 1 for number in range(3)}
    clock_ms = server_time_s(redis) * 1000
    recent = {f"recent-{n}": clock_ms - 1000 for n in range(redis_keys.MOST_FAILURES)}
    redis.zadd(redis_keys.FAILURES, {**old, **recent})
    attempt = claim()
    store.fail(attempt, Failure(code="generation_failed", detail="so"))
    assert redis.zcard(redis_keys.FAILURES) == redis_keys.MOST_FAILURES
    assert redis.zscore(redis_keys.FAILURES, attempt.job_id) is not None
    assert redis.zscore(redis_keys.FAILURES, "old-0") is None


def test_the_series_counts_what_ended_and_how_long_it_took(
    client: TestClient, redis: Redis, store: JobStore, claim: Claim
) -> None:
    done, failed, stopped = claim(), claim(), claim(mode="w8a8")
    redis.hincrby(redis_keys.record(done.job_id), "started_ms", -4000)
    store.succeed(done, VIDEO, TIMINGS)
    store.fail(failed, Failure(code="generation_failed", detail="so"))
    store.cancelled(stopped)
    answer = client.get("/series?hours=1").json()
    assert (answer["step_s"], len(answer["at"])) == (60, 60)
    assert [each - answer["at"][0] for each in answer["at"]] == list(range(0, 3600, 60))
    bf16, w8a8 = answer["modes"]
    assert (bf16["mode"], w8a8["mode"]) == ("bf16", "w8a8")
    assert (sum(bf16["succeeded"]), sum(bf16["failed"]), sum(bf16["cancelled"])) == (1, 1, 0)
    assert (sum(w8a8["succeeded"]), sum(w8a8["cancelled"])) == (0, 1)
    (run_s,) = [each for each in bf16["run_s"] if each is not None]
    assert 4 <= run_s < 30
    waits = [each for each in bf16["wait_s"] if each is not None]
    assert waits
    assert all(0 <= each < 30 for each in waits)
    assert all(each is None for each in w8a8["run_s"])
    for hours in ("0", "169", "x"):
        assert client.get(f"/series?hours={hours}").status_code == 422


@pytest.mark.parametrize(("hours", "step_s"), [(1, 60), (6, 60), (24, 300), (168, 1800)])
def test_longer_series_have_longer_steps_and_lose_nothing(
    redis: Redis, hours: int, step_s: int
) -> None:
    """A job in each minute of the time, and some before it."""
    minute = int(server_time_s(redis)) // 60
    with redis.pipeline() as pipe:
        for each in range(minute - hours * 60 - 100, minute + 1):
            key = redis_keys.series(each // 60)
            pipe.hincrbyfloat(key, f"{each % 60}|bf16|succeeded", 1)
            pipe.hincrbyfloat(key, f"{each % 60}|bf16|service", 1)
            pipe.hincrbyfloat(key, f"{each % 60}|bf16|service_s", 2.5)
        pipe.execute()
    series = read_series(redis, hours)
    (mode,) = series.modes
    per_step = step_s // 60
    assert series.step_s == step_s
    assert len(series.starts_s) == hours * 60 // per_step
    assert all(each % step_s == 0 for each in series.starts_s)
    succeeded = mode.ended["succeeded"]
    assert list(succeeded[:-1]) == [per_step] * (len(succeeded) - 1)
    assert 1 <= succeeded[-1] <= per_step
    assert set(mode.run_s) == {2.5}
    assert set(mode.wait_s) == {None}


def test_the_series_ends_by_itself(redis: Redis, store: JobStore, claim: Claim) -> None:
    store.cancelled(claim())
    keys = list(redis.scan_iter(f"{redis_keys.SERIES_PREFIX}*"))
    assert keys
    for key in keys:
        assert redis_keys.SERIES_TTL_S - 60 < redis.ttl(key) <= redis_keys.SERIES_TTL_S
