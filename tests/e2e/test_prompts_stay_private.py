"""Test that no prompt is in the logs of a real service and a real worker, whatever goes wrong."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import redis_keys
from tests.support.http_service import address, service
from tests.support.worker_processes import fake_worker

SECRET = "xyzzy-nobody-may-read-this"


class Caller:
    """Sends the secret in every possible way."""

    def __init__(self, client: httpx2.Client, redis: Redis) -> None:
        self._client = client
        self._redis = redis

    def generate(self, **changes: Any) -> httpx2.Response:
        body = {"prompt": SECRET, "negative_prompt": SECRET, "num_inference_steps": 2}
        return self._client.post("/generate", json=body | changes)

    def state(self, job_id: str) -> str:
        return str(self._client.get(f"/jobs/{job_id}").json()["state"])

    def finish(self) -> None:
        job_id = self.generate().json()["id"]
        wait_until(lambda: self.state(job_id) == "succeeded")

    def fail(self) -> None:
        job_id = self.generate(num_inference_steps=4).json()["id"]
        wait_until(lambda: self.state(job_id) == "failed")

    def be_refused(self) -> None:
        statuses = [
            self.generate(seed=-1).status_code,
            self.generate(prompt=SECRET * 50).status_code,
            self.generate(prompt=[SECRET]).status_code,
            self.generate(**{SECRET: SECRET}).status_code,
            self.generate(mode=SECRET).status_code,
            self.generate(webhook_url=f"https://{SECRET}").status_code,
            self._client.post("/generate", json=SECRET).status_code,
            self._client.post("/generate", content=f'{{"prompt": "{SECRET}').status_code,
            self._client.post("/generate", content=SECRET.encode("utf-16")).status_code,
            self._client.post("/generate", data={"prompt": SECRET}).status_code,
            self._client.get(f"/jobs?state={SECRET}").status_code,
            self._client.get(f"/jobs?cursor={SECRET}&limit={SECRET}").status_code,
            self._client.post(f"/generate?prompt={SECRET}", json={}).status_code,
            self._client.post("/v1/videos", json={"prompt": SECRET, "size": SECRET}).status_code,
            self._client.post("/v1/videos", data={"prompt": SECRET, "size": "1x1"}).status_code,
            self._client.post("/v1/videos", files={"input": (SECRET, SECRET)}).status_code,
        ]
        assert {status // 100 for status in statuses} == {4}, statuses

    def meet_a_broken_record(self) -> None:
        """Break a record that the service, its lists, its background tasks and the worker read."""
        job_id = self.generate(num_inference_steps=2).json()["id"]
        for text in (f'{{"prompt": "{SECRET}"', f'{{"prompt": "{SECRET}", "seed": "{SECRET}"}}'):
            self._redis.hset(redis_keys.record(job_id), "request", text)
            assert self._client.get(f"/jobs/{job_id}").status_code == 500
            assert self._client.delete(f"/jobs/{job_id}").status_code == 500
            assert self._client.get("/jobs").status_code == 200
        self._redis.hset(redis_keys.record(job_id), "lease_ms", 1)
        self._redis.hset(redis_keys.record(job_id), "state", "queued")
        self._redis.zadd(redis_keys.index("queued"), {job_id: 0})
        queue = self._redis.hget(redis_keys.record(job_id), "queue")
        assert isinstance(queue, bytes)
        self._redis.rpush(f"rq:queue:{queue.decode()}", job_id)

    def meet_a_redis_that_refuses(self) -> None:
        index = redis_keys.index("queued")
        self._redis.delete(index)
        self._redis.set(index, "not a sorted set")
        assert self.generate().status_code == 503
        self._redis.delete(index)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_prompt_is_logged(redis_url: str, redis: Redis, tmp_path: Path, log_format: str) -> None:
    artifacts = tmp_path / "artifacts"
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": artifacts.as_uri(),
        "ARTIFACTS_FOLDER": str(artifacts),
        "SERVICE_PORT": "0",
        "LOG_FORMAT": log_format,
    }
    worker_log = tmp_path / "worker.log"
    with (
        service(**environment) as process,
        fake_worker(worker_log, **environment),
        httpx2.Client(base_url=address(process), trust_env=False, timeout=30) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        caller = Caller(client, redis)
        caller.finish()
        caller.fail()
        caller.be_refused()
        caller.meet_a_broken_record()
        caller.meet_a_redis_that_refuses()
        time.sleep(4)  # a round of background tasks, and the worker's attempt at the broken record
        process.send_signal(signal.SIGTERM)
        _, service_log = process.communicate(timeout=20)
    worker_text = worker_log.read_text()
    for log, words in (
        (service_log, ("service.access", "cannot be read", "Redis failed")),
        (worker_text, ("succeeded", "memory")),
    ):
        for word in words:
            assert word in log, f"{word} is missing, so the fault was not met"
        for secret in (SECRET, SECRET[:12], json.dumps(SECRET * 2)[1:-1]):
            assert secret not in log
    if log_format == "json":
        for line in service_log.splitlines():
            json.loads(line)
        begun = [each for each in map(json.loads, worker_text.splitlines()) if "job_id" in each]
        assert begun
        assert all(each["worker_id"].startswith("fake.") for each in begun)
