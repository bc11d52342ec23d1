"""Test the newest preview of a running job over HTTP, and who may see it."""

import hashlib

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.store.job_store import JobStore
from jobs.store.live.previews import PreviewWriter
from tests.service.conftest import PREVIEW_BYTES, MakeJob, MakeKey


def path(job_id: str) -> str:
    return f"/jobs/{job_id}/preview.webp"


def test_a_running_job_shows_its_newest_preview(client: TestClient, make_job: MakeJob) -> None:
    # The first request with a query builds this, which on a busy machine outlasts a lease.
    client.get("/openapi.json")
    job = make_job(preview=True)
    view = client.get(f"/jobs/{job.id}").json()
    assert view["preview_url"] == f"http://testserver{path(job.id)}?number=1"
    answer = client.get(view["preview_url"])
    assert (answer.status_code, answer.content) == (200, PREVIEW_BYTES)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["etag"] == f'"{hashlib.sha256(PREVIEW_BYTES).hexdigest()}"'
    assert client.head(path(job.id)).headers["etag"] == answer.headers["etag"]


def test_a_caller_who_has_the_preview_is_not_sent_it_again(
    client: TestClient, make_job: MakeJob
) -> None:
    job = make_job(preview=True)
    etag = client.get(path(job.id)).headers["etag"]
    for sent in (etag, f'"other", W/{etag}', "*"):
        answer = client.get(path(job.id), headers={"If-None-Match": sent})
        assert (answer.status_code, answer.content) == (304, b""), sent
    assert client.get(path(job.id), headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("queued", "waits in its queue"),
        ("running", "no preview yet"),
        ("succeeded", "has succeeded, and previews are deleted at the end"),
        ("cancelled", "has been cancelled, and previews are deleted at the end"),
    ],
)
def test_a_job_without_a_preview_says_why(
    client: TestClient, store: JobStore, make_job: MakeJob, state: str, said: str
) -> None:
    job = make_job(video=state == "succeeded")
    if state == "running":
        store.claim(job.id, "w")
    if state == "cancelled":
        store.cancel(job.id)
    answer = client.get(path(job.id))
    assert answer.status_code == 404
    problem = answer.json()
    assert (problem["code"], problem["state"], problem["job_id"]) == ("no_preview", state, job.id)
    assert said in problem["detail"]
    assert client.get(f"/jobs/{job.id}").json()["preview_url"] is None


def test_nobody_else_sees_a_preview(
    client: TestClient, make_key: MakeKey, make_job: MakeJob
) -> None:
    owner, other = make_key("owner"), make_key("other")
    job = make_job("owner", preview=True)
    assert client.get(path(job.id), headers=owner).content == PREVIEW_BYTES
    refused = client.get(path(job.id), headers=other)
    assert (refused.status_code, refused.json()["code"]) == (404, "job_not_found")
    assert client.get(path(job.id)).status_code == 401


def test_an_event_announces_each_preview(
    client: TestClient, redis: Redis, store: JobStore, make_job: MakeJob
) -> None:
    job = make_job()
    attempt = store.claim(job.id, "w")
    PreviewWriter(redis).write(attempt, PREVIEW_BYTES)
    store.cancelled(attempt)
    events = client.get(f"/jobs/{job.id}/events").text.split("\n\n")
    (preview,) = [event for event in events if "event: preview\n" in event]
    assert '"preview":1' in preview
    assert all('"preview"' not in event for event in events if event is not preview and event)


def test_an_unknown_parameter_is_refused(client: TestClient, make_job: MakeJob) -> None:
    job = make_job(preview=True)
    assert client.get(f"{path(job.id)}?nunber=1").status_code == 422
