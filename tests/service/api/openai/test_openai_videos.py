"""Test `/v1/videos` after creation: read, list, fetch, delete, and errors in OpenAI's format."""

from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from jobs.record import Failure, Progress, Stage
from jobs.store.job_store import JobStore
from service.api.openai.job_progress import VideoStatus, video_statuses
from service.api.openai.schemas import VideoObject
from service.app import MAX_BODY_BYTES, create_app
from service.settings import ServiceSettings
from tests.service.conftest import (
    SPRITESHEET_BYTES,
    THUMBNAIL_BYTES,
    VIDEO_BYTES,
    MakeJob,
    MakeKey,
)


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Return the error of an answer, after checking that it has OpenAI's format."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def test_running_job(client: TestClient, store: JobStore, make_job: MakeJob) -> None:
    attempt = store.claim(make_job().id, "w")
    path = f"/v1/videos/{attempt.job_id}"
    assert client.get(path).headers["openai-poll-after-ms"] == "1000"
    percents = []
    for stage, steps in ((Stage.TEXT_ENCODER, 1), (Stage.DENOISE, 20), (Stage.VAE, 5)):
        for step in range(steps + 1):
            left = 60.0 - step
            progress = Progress(stage=stage, step=step, steps=steps, seconds_left=left)
            store.progress(attempt, progress)
            answer = client.get(path)
            assert answer.json()["status"] == "in_progress"
            assert answer.json()["seconds_left"] == left
            assert answer.headers["openai-poll-after-ms"] == str(min(5000, round(left * 100)))
            percents.append(answer.json()["progress"])
    assert percents == sorted(percents)
    assert (percents[0], percents[-1]) == (0, 98)
    assert percents[12] == 46


def test_finished_job(client: TestClient, make_job: MakeJob) -> None:
    job = make_job(video=True)
    answer = client.get(f"/v1/videos/{job.id}")
    assert "openai-poll-after-ms" not in answer.headers
    video = answer.json()
    assert (video["status"], video["progress"], video["seconds"]) == ("completed", 100, "2")
    assert job.finished_at is not None
    assert video["completed_at"] == int(job.finished_at.timestamp())
    assert video["expires_at"] == video["completed_at"] + 168 * 3600
    assert (video["error"], video["queue_position"], video["seconds_left"]) == (None, None, None)


def test_failed_job_is_an_ordinary_answer(
    client: TestClient, store: JobStore, make_job: MakeJob
) -> None:
    job = make_job()
    store.fail(store.claim(job.id, "w"), Failure(code="out_of_device_memory", detail="No room."))
    answer = client.get(f"/v1/videos/{job.id}")
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"] == {"code": "out_of_device_memory", "message": "No room."}
    assert answer.json()["progress"] == 0
    assert answer.json()["seconds"] is None, "the frame rate is unknown without a worker"


def test_cancelled_job_is_a_failed_one(
    client: TestClient, store: JobStore, make_job: MakeJob, live_worker: WorkerOffer
) -> None:
    job = make_job()
    store.cancel(job.id)
    video = client.get(f"/v1/videos/{job.id}").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    assert video["seconds"] == "2", "the offer of a live worker has the frame rate"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages(client: TestClient, make_job: MakeJob, order: str) -> None:
    ids = sorted((make_job().id for _ in range(5)), reverse=order == "desc")
    first = client.get("/v1/videos", params={"limit": 3, "order": order}).json()
    assert [video["id"] for video in first["data"]] == ids[:3]
    assert (first["object"], first["first_id"], first["last_id"]) == ("list", ids[0], ids[2])
    assert first["has_more"]
    after = {"limit": 3, "order": order, "after": first["last_id"]}
    second = client.get("/v1/videos", params=after).json()
    assert [video["id"] for video in second["data"]] == ids[3:]
    assert not second["has_more"]
    end = client.get("/v1/videos", params={"order": order, "after": second["last_id"]}).json()
    assert end == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_list_shows_places_and_goes_past_what_cannot_be_read(
    client: TestClient, redis: Redis, make_job: MakeJob
) -> None:
    queued = [make_job().id for _ in range(4)]
    ids = sorted(queued)
    for broken in ids[:2]:
        redis.hset(redis_keys.record(broken), "request", "{}")
    page = client.get("/v1/videos", params={"limit": 1, "order": "asc"}).json()
    (video,) = page["data"]
    assert (video["id"], page["has_more"]) == (ids[2], True)
    assert video["queue_position"] == queued.index(ids[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("limit", each) for each in ("0", "201", "x", "")),
        *(("order", each) for each in ("up", "ASC", "")),
        *(("after", each) for each in ("", "../x", "a" * 65, "\x00", "é", "video_123")),
        *(("after", each) for each in ("0" * 32, "f" * 32)),
    ],
)
def test_bad_parameters_are_named(client: TestClient, name: str, value: str) -> None:
    error = error_of(client.get("/v1/videos", params={name: value}), 400)
    assert (error["param"], error["code"]) == (name, "invalid_spec")
    assert error["message"].startswith(f"{name} is {value}")


def test_the_page_after_a_deleted_video_is_still_there(
    client: TestClient, make_job: MakeJob
) -> None:
    """Who lists and deletes, as a loop over `client.videos.list()` does, misses nothing."""
    ids = [make_job().id for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 1}).json()
    assert page["last_id"] == ids[2]
    assert client.delete(f"/v1/videos/{ids[2]}").status_code == 200
    page = client.get("/v1/videos", params={"limit": 1, "after": ids[2]}).json()
    assert page["last_id"] == ids[1]


def test_content_is_the_video_whole_or_in_parts(client: TestClient, make_job: MakeJob) -> None:
    path = f"/v1/videos/{make_job(video=True).id}/content"
    whole = client.get(path, params={"variant": "video"})
    assert (whole.status_code, whole.content) == (200, VIDEO_BYTES)
    assert whole.headers["content-type"] == "video/mp4"
    part = client.get(path, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, VIDEO_BYTES[10:20])
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    beyond = client.get(path, headers={"range": "bytes=9999-"})
    assert error_of(beyond, 416)["code"] == "range_not_satisfiable"
    assert beyond.headers["content-range"] == f"bytes */{len(VIDEO_BYTES)}"
    assert error_of(client.get(path, headers={"range": "bytes=x"}), 400)["code"] == "bad_request"


@pytest.mark.parametrize(
    ("variant", "data"), [("thumbnail", THUMBNAIL_BYTES), ("spritesheet", SPRITESHEET_BYTES)]
)
def test_pictures_are_variants_of_the_content(
    client: TestClient, make_job: MakeJob, variant: str, data: bytes
) -> None:
    path = f"/v1/videos/{make_job(video=True).id}/content?variant={variant}"
    whole = client.get(path)
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["content-type"] == "image/webp"
    part = client.get(path, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    without = make_job(video=True, pictures=False)
    missing = client.get(f"/v1/videos/{without.id}/content?variant={variant}")
    assert error_of(missing, 404)["code"] == "picture_not_made"


@pytest.mark.parametrize("variant", ["thumbnails", "VIDEO", ""])
def test_other_variants_are_refused(client: TestClient, make_job: MakeJob, variant: str) -> None:
    path = f"/v1/videos/{make_job(video=True).id}/content"
    error = error_of(client.get(path, params={"variant": variant}), 400)
    assert error["param"] == "variant"
    assert error["message"].endswith("ask for one of video, thumbnail, spritesheet.")


def test_content_that_is_not_there_is_a_404(
    client: TestClient, settings: ServiceSettings, make_job: MakeJob
) -> None:
    queued = client.get(f"/v1/videos/{make_job().id}/content")
    assert error_of(queued, 404)["code"] == "video_not_ready"
    done = make_job(video=True)
    artifacts = open_artifacts(settings.artifacts_url)
    for stored in list(artifacts.list()):
        artifacts.delete(stored.key)
    gone = client.get(f"/v1/videos/{done.id}/content")
    assert error_of(gone, 404)["code"] == "video_gone"


def test_delete(
    client: TestClient, store: JobStore, settings: ServiceSettings, make_job: MakeJob
) -> None:
    artifacts = open_artifacts(settings.artifacts_url)
    running = store.claim(make_job().id, "w")
    for job_id in (make_job(video=True).id, make_job().id, running.job_id):
        answer = client.delete(f"/v1/videos/{job_id}")
        assert answer.status_code == 200
        assert answer.json() == {"id": job_id, "object": "video.deleted", "deleted": True}
        for method, path in (
            ("GET", f"/v1/videos/{job_id}"),
            ("GET", f"/v1/videos/{job_id}/content"),
            ("DELETE", f"/v1/videos/{job_id}"),
        ):
            assert error_of(client.request(method, path), 404)["code"] == "job_not_found"
        assert client.get(f"/jobs/{job_id}").status_code == 404
    assert list(artifacts.list()) == []
    assert store.renew(running), "its worker is asked to stop"
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("name", ["nope", "%2e%2e", "a%00b", "%ff", "x" * 300, "💥"])
def test_unknown_videos(client: TestClient, name: str) -> None:
    for method, path in (
        ("GET", f"/v1/videos/{name}"),
        ("DELETE", f"/v1/videos/{name}"),
        ("GET", f"/v1/videos/{name}/content"),
    ):
        error = error_of(client.request(method, path), 404)
        assert (error["type"], error["code"]) == ("not_found_error", "job_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
        ("POST", "/v1/images", 404, "not_found"),
        ("GET", "/v1/videos/", 404, "not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("POST", "/v1/videos/a", 405, "method_not_allowed"),
        ("GET", "/v1/models/sora-2", 404, "not_found"),
    ],
)
def test_routing_errors_have_the_shape(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    error = error_of(client.request(method, path), status)
    assert (error["code"], error["type"]) == (
        code,
        "not_found_error" if status == 404 else "invalid_request_error",
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/videos/edits"),
        ("POST", "/v1/videos/extensions"),
        ("POST", "/v1/videos/characters"),
        ("GET", "/v1/videos/characters/char_1"),
        ("POST", "/v1/videos/01a2/remix"),
    ],
)
def test_what_openai_has_beside_this_is_not_supported(
    client: TestClient, method: str, path: str
) -> None:
    error = error_of(client.request(method, path), 404)
    assert error["type"] == "not_found_error"
    assert "not supported" in error["message"]


def test_models_are_the_modes_that_are_served(client: TestClient, live_worker: WorkerOffer) -> None:
    assert client.get("/v1/models").json()["object"] == "list"
    models = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in models] == ["wan-mini:bf16", "wan-mini:w8a8"]
    assert [each["mode"] for each in models if each["is_default"]] == ["bf16"]
    for model in models:
        assert model["object"] == "model"
        assert model["created"] == int(live_worker.started_at.timestamp())
        assert client.get(f"/v1/models/{model['id']}").json() == model
        made = client.post("/v1/videos", json={"prompt": "x", "model": model["id"]}).json()
        assert (made["model"], made["mode"]) == (model["id"], model["mode"])


def test_without_workers_there_are_no_models(client: TestClient) -> None:
    assert client.get("/v1/models").json() == {"object": "list", "data": []}


def test_other_paths_keep_their_problem_documents(client: TestClient) -> None:
    for path in ("/v1x", "/v2/videos", "/jobs/v1"):
        answer = client.get(path)
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_too_large_has_the_shape(client: TestClient) -> None:
    answer = client.post("/v1/videos", content=b"x" * (MAX_BODY_BYTES + 1))
    assert error_of(answer, 413)["code"] == "body_too_large"


def test_a_foreign_page_is_refused_in_the_shape(client: TestClient) -> None:
    answer = client.post("/v1/videos", json={}, headers={"origin": "https://elsewhere.example"})
    assert error_of(answer, 403)["type"] == "permission_error"


def test_redis_away_is_a_503_in_the_shape(settings: ServiceSettings, unused_port: int) -> None:
    url = SecretStr(f"redis://127.0.0.1:{unused_port}/0")
    away = settings.model_copy(update={"redis_url": url})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        answer = client.get("/v1/videos")
    error = error_of(answer, 503)
    assert (error["type"], error["code"]) == ("server_error", "store_unavailable")
    assert answer.headers["retry-after"] == "5"


def test_a_job_is_described_though_redis_went_away_meanwhile(
    settings: ServiceSettings, unused_port: int, make_job: MakeJob
) -> None:
    waiting, done = make_job(), make_job(video=True)
    url = SecretStr(f"redis://127.0.0.1:{unused_port}/0")
    away = create_app(settings.model_copy(update={"redis_url": url})).state.app_state
    found = video_statuses(away, [waiting, done])
    assert found[waiting.id] == VideoStatus(None)
    assert found[waiting.id].poll_after_ms == 1000
    assert found[done.id].fps == 8
    assert VideoObject.of(done, found[done.id]).seconds == "2"


def test_an_unexpected_error_is_hidden_in_the_shape(settings: ServiceSettings) -> None:
    app = create_app(settings)

    @app.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("the secret of the service")

    with TestClient(app, raise_server_exceptions=False) as client:
        error = error_of(client.get("/v1/broken"), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


@pytest.mark.usefixtures("live_worker")
def test_keys_are_asked_for_and_owners_see_their_own(
    client: TestClient, make_key: MakeKey, make_job: MakeJob
) -> None:
    alice, bob = make_key("alice", quota=1), make_key("bob")
    for headers in ({}, {"Authorization": "Bearer sk-proj-123"}):
        answer = client.get("/v1/videos", headers=headers)
        assert error_of(answer, 401)["type"] == "authentication_error"
    made = client.post("/v1/videos", json={"prompt": "x"}, headers=alice).json()["id"]
    error = error_of(client.post("/v1/videos", json={"prompt": "x"}, headers=alice), 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "quota_exceeded")
    assert client.get(f"/v1/videos/{made}", headers=alice).json()["id"] == made
    error_of(client.get(f"/v1/videos/{made}", headers=bob), 404)
    error_of(client.delete(f"/v1/videos/{made}", headers=bob), 404)
    assert client.get("/v1/videos", headers=bob).json()["data"] == []
