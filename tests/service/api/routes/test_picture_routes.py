"""Test the routes of thumbnails and spritesheets: what they send, to whom, and what jobs say.

Every test runs with a folder and with a bucket. Ranges and caching are those of the video
(`test_video_route.py`).
"""

import hashlib
import json
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.store import open_artifacts
from jobs.record import Failure
from jobs.store.job_store import JobStore
from jobs.store.retention_index import RetentionIndex
from service.settings import ServiceSettings
from tests.service.conftest import SPRITESHEET_BYTES, THUMBNAIL_BYTES, MakeJob, MakeKey

PICTURES = {"thumbnail": THUMBNAIL_BYTES, "spritesheet": SPRITESHEET_BYTES}

each_picture = pytest.mark.parametrize("name", PICTURES)


@pytest.fixture
def settings(settings: ServiceSettings, each_artifacts_url: str) -> ServiceSettings:
    return settings.model_copy(update={"artifacts_url": each_artifacts_url})


def path_of(job_id: str, name: str) -> str:
    return f"/jobs/{job_id}/{name}.webp"


@each_picture
def test_whole_picture(client: TestClient, make_job: MakeJob, name: str) -> None:
    job, data = make_job(video=True), PICTURES[name]
    answer = client.get(path_of(job.id, name))
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert answer.headers["cache-control"] == "private, max-age=3600"
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["content-disposition"] == f'inline; filename="{job.id}-{name}.webp"'
    head = client.head(path_of(job.id, name))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "image/webp"
    assert head.headers["content-length"] == str(len(data))


@each_picture
def test_parts_and_held_copies(client: TestClient, make_job: MakeJob, name: str) -> None:
    path, data = path_of(make_job(video=True).id, name), PICTURES[name]
    part = client.get(path, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(data)}"
    beyond = client.get(path, headers={"range": f"bytes={len(data)}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    held = client.get(path, headers={"if-none-match": part.headers["etag"]})
    assert (held.status_code, held.content) == (304, b"")


def test_a_job_says_where_its_pictures_are_and_what_they_show(
    client: TestClient, make_job: MakeJob
) -> None:
    job = make_job(video=True)
    video = client.get(f"/jobs/{job.id}").json()["video"]
    assert client.get(video["thumbnail_url"]).content == THUMBNAIL_BYTES
    sheet = video["spritesheet"]
    url = sheet.pop("url")
    assert client.get(url).content == SPRITESHEET_BYTES
    assert sheet == {
        "columns": 5,
        "rows": 4,
        "frame_width": 96,
        "frame_height": 96,
        "count": 17,
        "frames": list(range(17)),
    }
    assert not {"key", "thumbnail"} & video.keys()


@each_picture
def test_a_link_opens_its_picture_without_a_key_and_nothing_else(
    client: TestClient, make_job: MakeJob, make_key: MakeKey, name: str
) -> None:
    alice, bob = make_key("alice"), make_key("bob")
    job, other = make_job("alice", video=True), make_job("alice", video=True)
    video = client.get(f"/jobs/{job.id}", headers=alice).json()["video"]
    links = {
        "video": video["url"],
        "thumbnail": video["thumbnail_url"],
        "spritesheet": video["spritesheet"]["url"],
    }
    assert client.get(links[name]).content == PICTURES[name]
    path, query = urlsplit(links[name]).path, urlsplit(links[name]).query
    assert path == path_of(job.id, name)

    forged = [
        f"{path}?{urlsplit(link).query}" for kind, link in links.items() if kind != name
    ]  # links to the other files of the job
    forged += [
        f"/jobs/{job.id}/video.mp4?{query}",
        f"{path_of(other.id, name)}?{query}",
        f"{path}?{query[:-1]}",
        f"{path}?{query}0",
        f"{path}?{query.replace('expires=1', 'expires=2')}",
        f"{path}?expires=99999999999",
    ]
    for link in forged:
        answer = client.get(link)
        assert (answer.status_code, answer.json()["code"]) == (403, "link_refused"), link
    assert client.get(path).status_code == 401
    assert client.get(path, headers=bob).json()["code"] == "job_not_found"
    assert client.get(path, headers=alice).content == PICTURES[name]


@each_picture
def test_no_picture_yet_or_ever(
    client: TestClient, store: JobStore, make_job: MakeJob, name: str
) -> None:
    job_id = make_job().id
    for state in ("queued", "running", "failed"):
        if state == "running":
            attempt = store.claim(job_id, "w")
        if state == "failed":
            store.fail(attempt, Failure(code="generation_failed", detail="no"))
        answer = client.get(path_of(job_id, name))
        assert answer.status_code == 404
        assert (answer.json()["code"], answer.json()["state"]) == ("video_not_ready", state)
        assert f"no {name}" in answer.json()["detail"]


@each_picture
def test_a_record_of_before_pictures_were_made(
    client: TestClient, redis: Redis, make_job: MakeJob, name: str
) -> None:
    job = make_job(video=True)
    key = redis_keys.record(job.id)
    text = redis.hget(key, "video")
    assert isinstance(text, bytes)
    fields = json.loads(text)
    del fields["thumbnail"], fields["spritesheet"]
    redis.hset(key, "video", json.dumps(fields))

    video = client.get(f"/jobs/{job.id}").json()["video"]
    assert (video["thumbnail_url"], video["spritesheet"]) == (None, None)
    assert client.get(video["url"]).status_code == 200
    answer = client.get(path_of(job.id, name))
    assert (answer.status_code, answer.json()["code"]) == (404, "picture_not_made")
    assert answer.json()["job_id"] == job.id


@each_picture
def test_a_picture_that_is_gone(
    client: TestClient, settings: ServiceSettings, redis: Redis, make_job: MakeJob, name: str
) -> None:
    job = make_job(video=True)
    artifacts = open_artifacts(settings.artifacts_url)
    artifacts.delete(f"videos/{job.id}/1-{name}.webp")
    answer = client.get(path_of(job.id, name))
    assert (answer.status_code, answer.json()["code"]) == (410, "video_gone")
    assert client.get(f"/jobs/{job.id}/video.mp4").status_code == 200

    RetentionIndex(redis).video_deleted(job.id)
    answer = client.get(path_of(job.id, name))
    assert (answer.status_code, answer.json()["code"]) == (410, "video_gone")
    assert answer.json()["detail"].startswith(f"The {name} of job {job.id} was deleted")
