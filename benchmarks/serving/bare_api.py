"""Serve the baseline for submitting: a FastAPI handler that only enqueues the same RQ job.

It has no checks, records, API keys or limits. Usage: `python -m benchmarks.serving.bare_api PORT`,
with REDIS_URL set.
"""

import os
import sys
import uuid
from typing import Any

import uvicorn
from fastapi import FastAPI
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer


def create_app(redis: Redis) -> FastAPI:
    """Build the application with its one handler."""
    app = FastAPI()
    queue = Queue("bare", connection=redis, serializer=JSONSerializer)

    @app.post("/generate", status_code=202)
    def generate(body: dict[str, Any]) -> dict[str, str]:
        job_id = uuid.uuid4().hex
        queue.enqueue("worker.tasks.generate", job_id, job_id=job_id, job_timeout=3600)
        return {"id": job_id, "prompt": body["prompt"]}

    return app


def main() -> None:
    """Serve the application."""
    redis = Redis.from_url(os.environ["REDIS_URL"])
    uvicorn.run(create_app(redis), port=int(sys.argv[1]), log_level="warning", access_log=True)


if __name__ == "__main__":
    main()
