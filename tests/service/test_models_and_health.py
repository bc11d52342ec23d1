"""What is served, and whether anything is."""

from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog
from jobs.catalog import WorkerOffer


def test_no_worker(client: TestClient) -> None:
    assert client.get("/models").json() == {"models": []}
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "no_live_worker")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_ready_while_a_worker_is_live(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "workers": 1}
    catalog.withdraw(redis, live_worker.worker_id)
    assert client.get("/readyz").status_code == 503


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
