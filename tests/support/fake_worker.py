"""Run a worker process with the fake engine, and optionally with a fault.

`python -m tests.support.fake_worker REDIS_URL ARTIFACTS_FOLDER SECONDS_PER_STEP [FAULT]`. The
worker's other settings come from its environment. FAULT is a name in `FAULTS`, or the process id of
the Redis to kill before the first claim.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

from rq.job import Job

from jobs.artifacts.known_store import open_known_artifacts
from jobs.redis_client import connect
from jobs.telemetry import tracing
from worker.consumer import serve
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings


def hang() -> None:
    """Hang in native code, where Python cannot interrupt the thread."""
    ctypes.CDLL(None).sleep(600)


def run_out_of_memory() -> None:
    raise MemoryError("there is none left")


FAULTS = {"hang": hang, "oom": run_out_of_memory}


class RedisKillingWorker(ResidentWorker):
    """A worker that kills its Redis once, after it took a job and before it claims it."""

    redis_pid = 0

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        if RedisKillingWorker.redis_pid:
            os.kill(RedisKillingWorker.redis_pid, signal.SIGKILL)
            RedisKillingWorker.redis_pid = 0


def main() -> None:
    redis_url, artifacts, seconds, *fault = sys.argv[1:]
    if fault and fault[0].isdecimal():
        RedisKillingWorker.redis_pid = int(fault.pop())
        setattr(serve, "ResidentWorker", RedisKillingWorker)  # noqa: B010  # a name it imports

    def on_step(step: int) -> None:
        time.sleep(float(seconds))
        if fault and step == 3:
            FAULTS[fault[0]]()

    settings = WorkerSettings(artifacts_url=Path(artifacts).resolve().as_uri())
    ids = configure_logging(settings.log_format)
    tracing.start(settings, "wan-worker")
    engine = FakeEngine(on_step)
    with closing(connect(redis_url)) as redis:
        store = open_known_artifacts(settings.artifacts_url, redis)
        store.probe()  # as at a real start, after which a job no longer waits for Redis
        status = serve.serve(serve.ServeContext(engine, redis, store), settings, ids)
    tracing.stop()
    sys.exit(status)


if __name__ == "__main__":
    main()
