"""Test the list of models and the health checks."""

import logging
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.catalog import WorkerOffer
from jobs.errors import ArtifactsUnavailable
from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings


def test_no_worker(client: TestClient) -> None:
    assert client.get("/models").json() == {"models": []}
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "no_live_worker")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_waiting_for_the_first_worker_is_no_error(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert client.get("/readyz").status_code == 503
        assert client.post("/generate", json={"prompt": "x"}).status_code == 503
    levels = {each.levelno for each in caplog.records if each.name == "service.middleware.problems"}
    assert levels == {logging.INFO, logging.WARNING}


def test_ready_while_a_worker_is_live(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "workers": 1, "degraded": 1}
    catalog.withdraw(redis, live_worker.worker_id)
    assert client.get("/readyz").status_code == 503


def test_readiness_says_whether_a_mode_runs_slower_than_it_could(
    client: TestClient, redis: Redis, offer: WorkerOffer
) -> None:
    first, *others = (mode.model_copy(update={"warning": None}) for mode in offer.modes)
    slow = first.model_copy(update={"warning": "The kernels do not run."})
    for modes, degraded in (((first, *others), 0), ((slow, *others), 1)):
        catalog.publish(redis, offer.model_copy(update={"modes": modes}))
        answer = client.get("/readyz").json()
        assert answer == {"status": "ready", "workers": 1, "degraded": degraded}
        metrics = client.get("/metrics").text
        for mode, value in ((first, degraded), (others[0], 0)):
            labels = f'mode="{mode.name}",model="wan-mini",worker="{offer.worker_id}"'
            assert f"wan_worker_degraded{{{labels}}} {value}.0" in metrics


def test_risky_settings_of_redis_degrade_the_service_and_are_logged_once(
    settings: ServiceSettings,
    redis: Redis,
    live_worker: WorkerOffer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with TestClient(create_app(settings)) as client:
            policy = 'wan_redis_unsafe{setting="maxmemory-policy"}'
            wait_until(lambda: f"{policy} 1.0" in client.get("/metrics").text, 30, "it is shown")
            answer = client.get("/readyz")
            assert answer.status_code == 200, "jobs can be run"
            assert answer.json()["status"] == "degraded"
            (warning,) = answer.json()["warnings"]
            assert "maxmemory-policy is allkeys-lru" in warning
            assert 'wan_redis_unsafe{setting="appendonly"} 0.0' in client.get("/metrics").text

            checks = client.app.state.app_state.checks  # type: ignore[attr-defined]
            checks.look_at_redis()
            assert caplog.text.count("maxmemory-policy is allkeys-lru") == 1
            redis.config_set("maxmemory-policy", "noeviction")
            checks.look_at_redis()
            assert client.get("/readyz").json() == {"status": "ready", "workers": 1, "degraded": 1}
            assert f"{policy} 0.0" in client.get("/metrics").text
    finally:
        redis.config_set("maxmemory-policy", "noeviction")


def test_a_missing_artifact_store_degrades_the_service_until_it_is_back(
    settings: ServiceSettings, live_worker: WorkerOffer
) -> None:
    folder = Path(str(urlsplit(settings.artifacts_url).path))
    with TestClient(create_app(settings)) as client:
        artifacts = client.app.state.app_state.artifacts  # type: ignore[attr-defined]
        artifacts.verify()
        assert "warnings" not in client.get("/readyz").json()
        away = folder.rename(folder.with_name("away"))
        with pytest.raises(ArtifactsUnavailable):
            artifacts.verify()
        answer = client.get("/readyz").json()
        assert answer["status"] == "degraded"
        assert answer["warnings"] == [
            "The artifact store is missing or does not respond; the log says why."
        ]
        away.rename(folder)
        artifacts.verify()
        assert client.get("/readyz").json() == {"status": "ready", "workers": 1, "degraded": 1}


def test_a_job_that_is_not_confirmed_is_answered_503_with_its_id(
    settings: ServiceSettings, store: JobStore, live_worker: WorkerOffer
) -> None:
    """There is no replica at all here."""
    waiting = settings.model_copy(update={"wait_replicas": 1, "wait_ms": 10})
    with TestClient(create_app(waiting)) as client:
        for path in ("/generate", "/v1/videos"):
            answer = client.post(path, json={"prompt": "a circle"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            job = store.list(limit=1).jobs[0]
            assert job.id in answer.text
            assert "may still run" in answer.text
        body, key = {"prompt": "a square"}, {"Idempotency-Key": "k"}
        first, again = (client.post("/generate", json=body, headers=key) for _ in range(2))
        assert first.json()["job_id"] == again.json()["job_id"]
        assert (first.status_code, again.status_code) == (503, 503)


def test_what_is_offered_is_read_once_in_a_while_and_readiness_is_not(
    settings: ServiceSettings, redis: Redis, offer: WorkerOffer
) -> None:
    kept = settings.model_copy(update={"catalog_kept_s": 10})
    catalog.publish(redis, offer)
    with TestClient(create_app(kept)) as client:
        first = client.get("/models").json()
        assert len(first["models"]) == 1
        catalog.withdraw(redis, offer.worker_id)
        assert client.get("/models").json() == first
        assert client.get("/readyz").status_code == 503


def test_what_is_offered_is_read_again_when_it_is_old(
    settings: ServiceSettings, redis: Redis, offer: WorkerOffer
) -> None:
    kept = settings.model_copy(update={"catalog_kept_s": 0.2})
    catalog.publish(redis, offer)
    with TestClient(create_app(kept)) as client:
        assert len(client.get("/models").json()["models"]) == 1
        catalog.withdraw(redis, offer.worker_id)
        time.sleep(0.3)
        assert client.get("/models").json() == {"models": []}


def test_the_first_worker_gets_jobs_as_soon_as_the_service_is_ready(
    settings: ServiceSettings, redis: Redis, offer: WorkerOffer
) -> None:
    kept = settings.model_copy(update={"catalog_kept_s": 10})
    with TestClient(create_app(kept)) as client:
        assert client.get("/models").json() == {"models": []}
        assert client.post("/generate", json={"prompt": "a circle"}).status_code == 503
        catalog.publish(redis, offer)
        assert client.get("/readyz").status_code == 200
        assert client.post("/generate", json={"prompt": "a circle"}).status_code == 202


def test_without_redis_it_is_not_ready(settings: ServiceSettings, unused_port: int) -> None:
    nowhere = SecretStr(f"redis://127.0.0.1:{unused_port}/0")
    away = settings.model_copy(update={"redis_url": nowhere})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        begun = time.monotonic()
        answer = client.get("/readyz")
        assert time.monotonic() - begun < 3
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert client.get("/healthz").json() == {"status": "ok"}


def test_models_show_bounds_modes_and_workers(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    second = {"worker_id": "worker-2", "device": "cuda:0", "modes": live_worker.modes[:1]}
    catalog.publish(redis, live_worker.model_copy(update=second))
    larger = live_worker.model.model_copy(update={"name": "wan-14b"})
    catalog.publish(
        redis, live_worker.model_copy(update={"worker_id": "worker-3", "model": larger})
    )
    large, mini = client.get("/models").json()["models"]
    assert (large["name"], mini["name"]) == ("wan-14b", "wan-mini")
    assert mini["sizes"] == ["96x96", "64x96"]
    assert (mini["min_frames"], mini["max_frames"], mini["fps"]) == (5, 17, 8)
    assert [(mode["name"], mode["workers"]) for mode in mini["modes"]] == [("bf16", 2), ("w8a8", 1)]
    assert [(worker["id"], worker["device"]) for worker in mini["workers"]] == [
        ("worker-1", "cpu"),
        ("worker-2", "cuda:0"),
    ]
    assert len(large["workers"]) == 1
