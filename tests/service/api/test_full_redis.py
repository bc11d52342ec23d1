"""Test a Redis that is full and refuses to write (noeviction): requests that only read go on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.catalog import WorkerOffer
from service.app import create_app
from service.auth.api_keys import Role
from service.settings import ServiceSettings
from tests.service.conftest import VIDEO_BYTES, MakeJob, MakeKey


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    before = redis.config_get("maxmemory*")
    redis.config_set("maxmemory-policy", "noeviction")
    redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        for name in ("maxmemory", "maxmemory-policy"):
            redis.config_set(name, str(before[name]))


def test_who_has_a_key_goes_on_reading_and_is_not_counted(
    client: TestClient,
    redis: Redis,
    live_worker: WorkerOffer,
    make_key: MakeKey,
    make_job: MakeJob,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ops = make_key("op", Role.OPS, rate="100/minute")
    finished, queued = make_job("alice", video=True), make_job("alice")
    assert client.get(f"/jobs/{finished.id}", headers=ops).status_code == 200
    caplog.set_level(logging.INFO, "service.auth.rate_limit")
    with full(redis):
        for path in ("/jobs", "/models", f"/jobs/{finished.id}", f"/v1/videos/{queued.id}"):
            assert client.get(path, headers=ops).status_code == 200
        url = client.get(f"/jobs/{finished.id}", headers=ops).json()["video"]["url"]
        assert client.get(url.removeprefix("http://testserver")).content == VIDEO_BYTES
        metrics = client.get("/metrics", headers=ops)
        assert "\nwan_redis_up 1.0\n" in metrics.text
        assert "wan_jobs{" in metrics.text
        for refused in (
            client.post("/generate", json={"prompt": "a"}, headers=ops),
            client.delete(f"/jobs/{queued.id}", headers=ops),
        ):
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        # Writes that need no memory succeed, so jobs can be deleted to make room.
        assert client.delete(f"/v1/videos/{finished.id}", headers=ops).status_code == 200
    assert client.delete(f"/jobs/{queued.id}", headers=ops).status_code == 200
    logged = [
        record.message for record in caplog.records if record.name == "service.auth.rate_limit"
    ]
    assert [text.split(",")[0] for text in logged] == ["Redis is full", "Redis has room again"]


def test_links_of_an_earlier_secret_are_signed_by_a_process_that_starts_now(
    settings: ServiceSettings, client: TestClient, redis: Redis, make_job: MakeJob
) -> None:
    job = make_job(video=True)
    link = client.get(f"/jobs/{job.id}").json()["video"]["url"]
    with full(redis), TestClient(create_app(settings)) as another:
        assert another.get(link.removeprefix("http://testserver")).status_code == 200
        assert another.get(f"/jobs/{job.id}").status_code == 200
