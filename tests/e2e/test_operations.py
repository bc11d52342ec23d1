"""Test what operators see of a real run: metrics, workers, and what is left after retention."""

import re
import signal
from pathlib import Path

import httpx2
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from tests.support.http_service import address, service
from tests.support.worker_processes import fake_worker


def value(metrics: str, sample: str) -> float:
    found = re.findall(rf"^{sample}(?:{{.*}})? (\S+)$", metrics, re.M)
    assert len(found) == 1, f"{sample}: {found}"
    return float(found[0])


def test_a_run_is_seen_and_leaves_nothing(redis_url: str, redis: Redis, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": artifacts.as_uri(),
        "ARTIFACTS_FOLDER": str(artifacts),
        "SERVICE_PORT": "0",
    }
    with (
        service(**environment) as process,
        fake_worker(tmp_path / "worker.log", **environment),
        httpx2.Client(base_url=address(process), trust_env=False, timeout=30) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        body = {"prompt": "red", "num_inference_steps": 2}
        job = client.post("/generate", json=body).json()
        wait_until(lambda: client.get(f"/jobs/{job['id']}").json()["state"] == "succeeded")
        wait_until(lambda: "wan_worker_jobs_done_total" in client.get("/metrics").text)
        wait_until(lambda: value(client.get("/metrics").text, "wan_worker_jobs_done_total") == 1)

        metrics = client.get("/metrics").text
        assert value(metrics, "wan_jobs_ended_total") == 1
        assert value(metrics, "wan_job_service_seconds_count") == 1
        assert value(metrics, "wan_step_seconds") > 0
        assert value(metrics, "wan_queue_workers") == 1
        (worker,) = client.get("/workers").json()["workers"]
        assert (worker["state"], worker["jobs_done"]) == ("idle", 1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

    # Another process, for which everything is past its time, deletes it at its start.
    redis.delete(redis_keys.RETENTION_DONE)
    with service(**environment, SERVICE_KEEP_JOBS_H="0.000001") as process:
        address(process)
        wait_until(lambda: not redis.keys(f"*{job['id']}*"))
    assert list(artifacts.rglob("*.mp4")) == []
    for name in redis.keys("rq:*"):
        kind = redis.type(name)
        members = redis.zrange(name, 0, -1) if kind == b"zset" else []
        assert not any(job["id"].encode() in each for each in members), name
