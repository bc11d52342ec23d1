"""Test `count`, `metadata`, the filters of the list, and deletion by `purge=true`."""

import json
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog
from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from jobs.spec import MAX_SEED
from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings
from tests.service.conftest import MakeJob, MakeKey

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
