"""Test reading, listing and cancelling jobs over HTTP."""

import json
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis
from rq import Queue

from jobs import catalog, durations, redis_keys
from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from jobs.durations import Durations
from jobs.record import Failure, Progress, Stage, StageTimings, Video
from jobs.spec import MAX_SEED, GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey

VIDEO = Video(
    key="videos/x/1.mp4", bytes=10, sha256="ab", width=96, height=96, num_frames=17, fps=8
)
TIMINGS = StageTimings(
    queue_s=0.1, text_encoder_s=0.2, denoise_s=3, vae_s=0.4, mp4_s=0.1, total_s=3.8
)


@pytest.fixture
def job_id(store: JobStore, request_for_video: GenerationRequest) -> str:
    return store.create(request_for_video, "q").job.id


def test_running_job_shows_its_progress(client: TestClient, store: JobStore, job_id: str) -> None:
    attempt = store.claim(job_id, "w")
    store.progress(attempt, Progress(stage=Stage.DENOISE, step=4, steps=20))
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["state"], job["attempts"]) == ("running", 1)
    assert job["progress"] == {"stage": "denoise", "step": 4, "steps": 20, "seconds_left": None}
    assert attempt.token not in str(job)


def test_waiting_jobs_show_their_places_and_no_others_do(
    client: TestClient,
    store: JobStore,
    redis: Redis,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    durations.measure(redis, request_for_video, Durations(step_s=2.0, rest_s=5.04))
    queue = live_worker.queue
    running, first, second = (store.create(request_for_video, queue).job.id for _ in range(3))
    elsewhere = store.create(request_for_video, "nobody-serves-it").job.id
    redis.lpop(Queue(queue, connection=redis).key)
    attempt = store.claim(running, "w")
    progress = Progress(stage=Stage.DENOISE, step=4, steps=20, seconds_left=7.25)
    store.progress(attempt, progress)
    expected = {
        running: None,
        first: {"position": 1, "starts_in_s": 7.2},
        second: {"position": 2, "starts_in_s": 52.3},
        elsewhere: {"position": 0, "starts_in_s": None},
    }
    listed = client.get("/jobs").json()["jobs"]
    assert {job["id"]: job["queue"] for job in listed} == expected
    for job_id, position in expected.items():
        assert client.get(f"/jobs/{job_id}").json()["queue"] == position
    assert client.get(f"/jobs/{running}").json()["progress"]["seconds_left"] == 7.25
    assert client.delete(f"/jobs/{first}").json()["queue"] is None
    assert client.get(f"/jobs/{second}").json()["queue"]["position"] == 1


def test_what_became_of_attempts_is_shown_and_who_made_them_is_not(
    client: TestClient, store: JobStore, job_id: str
) -> None:
    store.give_up(store.claim(job_id, "worker-of-ours"))
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["attempts"], job["lost"], job["priority"]) == (1, 1, False)
    assert job["deadline_s"] == store.get(job_id).deadline_s > 600
    store.claim(job_id, "worker-of-ours")
    assert "worker-of-ours" not in client.get(f"/jobs/{job_id}").text


def test_succeeded_job_has_an_absolute_url(
    client: TestClient, store: JobStore, job_id: str
) -> None:
    store.succeed(store.claim(job_id, "w"), VIDEO, TIMINGS)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["video"]["url"].startswith(f"http://testserver/jobs/{job_id}/video.mp4?expires=")
    assert job["timings"]["denoise_s"] == 3
    assert "key" not in job["video"]


def test_failed_job_is_an_ordinary_answer(client: TestClient, store: JobStore, job_id: str) -> None:
    store.fail(store.claim(job_id, "w"), Failure(code="out_of_device_memory", detail="No room."))
    answer = client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200
    assert answer.json()["failure"] == {"code": "out_of_device_memory", "detail": "No room."}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["nope", "%2e%2e", "a%00b", "%ff", "x" * 300, "wan:job:1", "💥"])
def test_unknown_jobs(client: TestClient, method: str, name: str) -> None:
    answer = client.request(method, f"/jobs/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "job_not_found"


def test_cancel_queued(client: TestClient, store: JobStore, redis: Redis, job_id: str) -> None:
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert redis.llen("rq:queue:q") == 0
    assert client.delete(f"/jobs/{job_id}").json() == answer.json()


def test_cancel_running_asks(client: TestClient, store: JobStore, job_id: str) -> None:
    attempt = store.claim(job_id, "w")
    answer = client.delete(f"/jobs/{job_id}")
    assert answer.status_code == 202
    assert (answer.json()["state"], answer.json()["cancel_requested"]) == ("running", True)
    store.cancelled(attempt)
    assert client.delete(f"/jobs/{job_id}").status_code == 200


def test_cancel_too_late(client: TestClient, store: JobStore, job_id: str) -> None:
    store.succeed(store.claim(job_id, "w"), VIDEO, TIMINGS)
    answer = client.delete(f"/jobs/{job_id}")
    assert answer.status_code == 409
    problem = answer.json()
    assert (problem["code"], problem["state"], problem["job_id"]) == (
        "job_not_cancellable",
        "succeeded",
        job_id,
    )


def test_pages(client: TestClient, store: JobStore, request_for_video: GenerationRequest) -> None:
    ids = [store.create(request_for_video, "q").job.id for _ in range(5)]
    first = client.get("/jobs", params={"limit": 3}).json()
    second = client.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    seen = [job["id"] for job in first["jobs"] + second["jobs"]]
    assert seen == sorted(ids, reverse=True)
    assert second["next_cursor"] is None


def test_list_by_state(
    client: TestClient, store: JobStore, request_for_video: GenerationRequest, job_id: str
) -> None:
    store.create(request_for_video, "q")
    store.cancel(job_id)
    for state in JobState:
        jobs = client.get("/jobs", params={"state": state.value}).json()["jobs"]
        assert all(job["state"] == state for job in jobs)
        assert len(jobs) == (state in (JobState.QUEUED, JobState.CANCELLED))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("limit", each) for each in ("0", "-1", "201", "x", "1.5", "")),
        *(("state", each) for each in ("paused", "QUEUED", "")),
        *(("cursor", each) for each in ("", "x", "c../..", "c" + "a" * 200, "\x00", "é")),
    ],
)
def test_bad_parameters_are_named(client: TestClient, name: str, value: str) -> None:
    answer = client.get("/jobs", params={name: value})
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == name
    assert error["bound"]


@pytest.mark.parametrize(
    ("name", "value", "shown", "bound"),
    [
        ("limit", "0", 0, "a whole number from 1 to 200"),
        ("limit", "201", 201, "a whole number from 1 to 200"),
        ("limit", "many", "many", "a whole number from 1 to 200"),
        ("state", "paused", "paused", "one of queued, running, succeeded, failed, cancelled"),
    ],
)
def test_bounds_of_parameters_are_described_by_the_service(
    client: TestClient, name: str, value: str, shown: object, bound: str
) -> None:
    assert client.get("/jobs", params={name: value}).json()["errors"] == [
        {
            "field": name,
            "value": shown,
            "bound": bound,
            "detail": f"{name} is {value}, which is not {bound}.",
        }
    ]


def test_unreadable_record_hides_no_other_and_is_not_cancelled(
    client: TestClient,
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    job_id: str,
) -> None:
    sound = store.create(request_for_video, "q").job.id
    redis.hset(redis_keys.record(job_id), "request", '{"prompt": "a secret"}')
    answer = client.get("/jobs")
    assert answer.status_code == 200
    assert [job["id"] for job in answer.json()["jobs"]] == [sound]
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"]) == (500, "record_unreadable")
    assert redis.hget(redis_keys.record(job_id), "state") == b"queued"


def test_unreadable_record_is_a_clear_500_without_its_prompt(
    client: TestClient, redis: Redis, job_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis.hset(redis_keys.record(job_id), "request", '{"prompt": "a secret"}')
    answer = client.get(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"]) == (500, "record_unreadable")
    assert job_id in caplog.text
    assert "a secret" not in answer.text + caplog.text


@pytest.mark.parametrize(
    ("field", "value"), [("attempts", "x"), ("queue", None), ("shape", None), ("request", "{}")]
)
def test_unreadable_record_is_its_owners_to_delete(
    client: TestClient,
    redis: Redis,
    make_key: MakeKey,
    make_job: MakeJob,
    field: str,
    value: str | None,
) -> None:
    alice, bob = make_key("alice"), make_key("bob")
    for job in (make_job("alice"), make_job("alice", video=True)):
        record = redis_keys.record(job.id)
        redis.hset(record, field, value) if value is not None else redis.hdel(record, field)
        redis.hset(record, "lost", "many")
        for method, path in (("GET", f"/jobs/{job.id}"), ("DELETE", f"/v1/videos/{job.id}")):
            assert client.request(method, path, headers=bob).status_code == 404
        problem = client.delete(f"/jobs/{job.id}", headers=alice).json()
        assert f"`DELETE /v1/videos/{job.id}` deletes it." in problem["detail"]
        assert client.delete(f"/v1/videos/{job.id}", headers=alice).status_code == 200
        assert client.get(f"/jobs/{job.id}", headers=alice).status_code == 404
        assert not redis.exists(record)
    assert redis.zcard(redis_keys.index("all")) == 0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/jobs?stat=queued", "stat"),
        ("/jobs?State=queued", "State"),
        ("/jobs?limit=5&page=2", "page"),
        ("/jobs?=5", ""),
        ("/jobs/ID?full=1", "full"),
        ("/jobs/ID/events?since=1", "since"),
        ("/jobs/ID/video.mp4?download=1", "download"),
        ("/models?mode=bf16", "mode"),
        ("/session?x", "x"),
    ],
)
def test_unknown_parameters_are_refused(
    client: TestClient, make_job: MakeJob, path: str, name: str
) -> None:
    """As unknown fields are: a misspelt filter would otherwise list everything."""
    path = path.replace("ID", make_job(video=True).id)
    answer = client.get(path)
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert error["field"] == name
    assert "is not a query parameter of this address" in error["detail"]


def test_health_checks_answer_whatever_is_appended(client: TestClient) -> None:
    assert client.get("/healthz?t=1795356856").status_code == 200


ASK = {"prompt": "a small red circle"}


def ids_of(answer: Any) -> list[str]:
    assert answer.status_code in (200, 202), answer.text
    return [job["id"] for job in answer.json()["jobs"]]


@pytest.mark.usefixtures("live_worker")
def test_a_count_makes_a_group_with_seeds_in_a_row(client: TestClient, redis: Redis) -> None:
    answer = client.post("/generate", json=ASK | {"count": 3, "seed": 7, "metadata": {"a": "b"}})
    group, jobs = answer.json()["group"], answer.json()["jobs"]
    assert group == jobs[0]["id"]
    assert [job["request"]["seed"] for job in jobs] == [7, 8, 9]
    assert {job["group"] for job in jobs} == {group}
    assert [job["metadata"] for job in jobs] == [{"a": "b"}] * 3
    assert [job["queue"]["position"] for job in jobs] == [0, 1, 2]
    assert answer.headers["location"] == f"/jobs?group={group}"
    client.post("/generate", json=ASK)
    assert ids_of(client.get(answer.headers["location"])) == [job["id"] for job in reversed(jobs)]
    assert client.get(f"/jobs/{jobs[2]['id']}").json() == jobs[2]


@pytest.mark.usefixtures("live_worker")
def test_a_count_of_one_is_a_group_and_no_count_is_none(client: TestClient) -> None:
    one = client.post("/generate", json=ASK | {"count": 1}).json()
    assert [job["group"] for job in one["jobs"]] == [one["group"]]
    alone = client.post("/generate", json=ASK).json()
    assert (alone["group"], alone["metadata"]) == (None, {})


@pytest.mark.usefixtures("live_worker")
def test_drawn_seeds_of_a_group_differ(client: TestClient) -> None:
    jobs = client.post("/generate", json=ASK | {"count": 8}).json()["jobs"]
    first = jobs[0]["request"]["seed"]
    assert [job["request"]["seed"] for job in jobs] == list(range(first, first + 8))


BAD = [
    ({"count": 0}, "count", "1 to 8"),
    ({"count": 9}, "count", "1 to 8"),
    ({"count": "2"}, "count", "1 to 8"),
    ({"count": 2, "seed": MAX_SEED}, "seed", "at most 9223372036854775806"),
    ({"metadata": {f"{n}": "" for n in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"": "x"}}, "metadata", "1 to 64"),
    ({"metadata": {"x" * 65: "x"}}, "metadata", "1 to 64"),
    ({"metadata": {"x": "x" * 513}}, "metadata", "at most 512"),
    ({"metadata": {"x": 5}}, "metadata", "texts"),
    ({"metadata": {"x": "\x00"}}, "metadata", "texts"),
    ({"metadata": {"x": "\ud800"}}, "metadata", "texts"),
    ({"metadata": ["x"]}, "metadata", "texts"),
]


@pytest.mark.parametrize(("fields", "field", "bound"), BAD, ids=lambda v: ascii(v)[:30])
def test_bounds_of_count_and_metadata(
    client: TestClient,
    live_worker: WorkerOffer,
    redis: Redis,
    fields: dict[str, Any],
    field: str,
    bound: str,
) -> None:
    content = json.dumps(ASK | fields)  # escapes lone surrogates
    headers = {"content-type": "application/json"}
    answer = client.post("/generate", content=content, headers=headers)
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert error["field"] == field
    assert bound in error["bound"]
    assert redis.llen(f"rq:queue:{live_worker.queue}") == 0


@pytest.mark.usefixtures("live_worker")
def test_the_most_metadata_is_kept_as_it_came(client: TestClient) -> None:
    metadata = {f"{n:064}": "é" * 512 for n in range(16)}
    job = client.post("/generate", json=ASK | {"metadata": metadata, "count": 2.0}).json()["jobs"][
        1
    ]
    assert client.get(f"/jobs/{job['id']}").json()["metadata"] == metadata


@pytest.mark.usefixtures("live_worker")
def test_a_repeated_request_gets_the_same_group(
    client: TestClient, redis: Redis, live_worker: WorkerOffer, store: JobStore
) -> None:
    body, key = ASK | {"count": 3}, {"Idempotency-Key": "k"}
    first = client.post("/generate", json=body, headers=key)
    again = client.post("/generate", json=body, headers=key)
    assert again.headers["idempotent-replayed"] == "true"
    assert ids_of(again) == ids_of(first)
    assert redis.llen(f"rq:queue:{live_worker.queue}") == 3
    catalog.withdraw(redis, live_worker.worker_id)
    store.purge(ids_of(first)[1])
    again = client.post("/generate", json=body, headers=key)
    assert ids_of(again) == [ids_of(first)[0], ids_of(first)[2]]
    assert client.post("/generate", json=body | {"count": 2}, headers=key).status_code == 409


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("limit", ["quota", "queue"])
def test_each_of_a_group_counts_and_all_or_none_are_queued(
    settings: ServiceSettings, make_key: MakeKey, redis: Redis, live_worker: WorkerOffer, limit: str
) -> None:
    key = make_key("ann", quota=4) if limit == "quota" else make_key("ann")
    if limit == "queue":
        settings = settings.model_copy(update={"max_waiting": 4})
    with TestClient(create_app(settings)) as client:
        assert client.post("/generate", json=ASK | {"count": 2}, headers=key).status_code == 202
        refused = client.post("/generate", json=ASK | {"count": 3}, headers=key)
        assert refused.status_code == 429
        assert "too many for 3 more" in refused.json()["detail"]
        assert redis.llen(f"rq:queue:{live_worker.queue}") == 2
        assert len(ids_of(client.get("/jobs", headers=key))) == 2
        assert client.post("/generate", json=ASK | {"count": 2}, headers=key).status_code == 202


@pytest.mark.usefixtures("live_worker")
def test_lists_by_mode_over_pages(client: TestClient) -> None:
    modes = ["bf16", "w8a8", "w8a8", "bf16", "w8a8"]
    made = [client.post("/generate", json=ASK | {"mode": mode}).json()["id"] for mode in modes]
    wanted = [job for job, mode in zip(made, modes, strict=True) if mode == "w8a8"]
    found: list[str] = []
    cursor: dict[str, str] | None = {}
    while cursor is not None:
        page = client.get("/jobs", params={"mode": "w8a8", "limit": "2"} | cursor).json()
        found += [job["id"] for job in page["jobs"]]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None
    assert found == wanted[::-1]
    assert ids_of(client.get("/jobs", params={"mode": "int4"})) == []


def test_lists_by_time(client: TestClient, make_job: MakeJob) -> None:
    jobs = [make_job() for _ in range(3)]
    middle = jobs[1].created_at
    after = ids_of(client.get("/jobs", params={"created_after": middle.isoformat()}))
    before = ids_of(client.get("/jobs", params={"created_before": middle.isoformat()}))
    assert set(after) | set(before) == {job.id for job in jobs}
    assert jobs[1].id in after
    assert not set(after) & set(before)
    later = (jobs[2].created_at + timedelta(seconds=1)).isoformat()
    assert ids_of(client.get("/jobs", params={"created_after": later})) == []
    page = client.get("/jobs", params={"created_before": later, "limit": 2}).json()
    rest = client.get(
        "/jobs", params={"created_before": later, "limit": 2, "cursor": page["next_cursor"]}
    )
    assert ids_of(rest) == [jobs[0].id]


@pytest.mark.parametrize("value", ["yesterday", "", "2026-11-22T14:14:16"])
def test_a_time_without_a_zone_is_refused(client: TestClient, value: str) -> None:
    (error,) = client.get("/jobs", params={"created_after": value}).json()["errors"]
    assert (error["field"], error["bound"]) == (
        "created_after",
        "a time with its zone, like 2026-11-22T14:14:16Z",
    )


@pytest.mark.parametrize("video", [True, False])
def test_purge_deletes_job_and_video(
    client: TestClient, make_job: MakeJob, settings: ServiceSettings, video: bool
) -> None:
    job, kept = make_job(video=video), make_job(video=True)
    answer = client.delete(f"/jobs/{job.id}?purge=true")
    assert (answer.status_code, answer.content) == (204, b"")
    assert client.get(f"/jobs/{job.id}").status_code == 404
    assert kept.video is not None
    stored = {each.key for each in open_artifacts(settings.artifacts_url).list()}
    assert stored == set(kept.video.keys)
    assert client.delete(f"/jobs/{job.id}?purge=true").status_code == 404


def test_purge_of_somebody_elses_job_does_nothing(
    client: TestClient, make_job: MakeJob, make_key: MakeKey
) -> None:
    key, other = make_key("a"), make_key("b")
    job = make_job("a", video=True)
    assert client.delete(f"/jobs/{job.id}?purge=true", headers=other).status_code == 404
    assert client.get(f"/jobs/{job.id}/video.mp4", headers=key).status_code == 200


@pytest.mark.usefixtures("live_worker")
def test_what_has_no_effect_is_noted(client: TestClient) -> None:
    asked = ASK | {"guidance_scale": 1, "negative_prompt": "dark"}
    (note,) = client.post("/generate", json=asked).json()["notes"]
    assert note.startswith("negative_prompt has no effect")
    assert client.post("/v1/videos", json=asked).json()["notes"] == [note]
    for changes in ({"guidance_scale": 1}, {"negative_prompt": "dark"}):
        assert client.post("/generate", json=ASK | changes).json()["notes"] == []


@pytest.mark.parametrize("value", ["0.5", "1764500000", "-1", "2026", "yesterday", "2026-11-30"])
def test_times_are_written_as_the_document_says(client: TestClient, value: str) -> None:
    for name in ("created_after", "created_before"):
        answer = client.get("/jobs", params={name: value})
        assert answer.status_code == 422, value
        assert name in answer.text
    sound = {"created_after": "2026-11-30T12:00:00Z", "created_before": "2026-11-30T14:00:00+01:00"}
    assert client.get("/jobs", params=sound).status_code == 200
