"""A worker process with the fake engine, and faults that happen when a test wants them to.

`python -m tests.support.fake_worker REDIS_URL ARTIFACTS_FOLDER SECONDS_PER_STEP [FAULT]`, with the
worker's other settings from its environment. A fault is a name in `FAULTS`, or the process id of
the Redis that is to be lost before a claim.
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

from jobs.artifacts.folder import FolderArtifactStore
from jobs.redis_client import connect
from worker.consumer import serve
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings


def hang() -> None:
    """In native code, where Python reaches no thread."""
    ctypes.CDLL(None).sleep(600)


def run_out_of_memory() -> None:
    raise MemoryError("there is none left")


FAULTS = {"hang": hang, "oom": run_out_of_memory}


class Unlucky(ResidentWorker):
    """Loses its Redis, once, when it has taken a job and not yet claimed it."""

    redis_pid = 0

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        if Unlucky.redis_pid:
            os.kill(Unlucky.redis_pid, signal.SIGKILL)
            Unlucky.redis_pid = 0


def main() -> None:
    redis_url, artifacts, seconds, *fault = sys.argv[1:]
    if fault and fault[0].isdecimal():
        Unlucky.redis_pid = int(fault.pop())
        setattr(serve, "ResidentWorker", Unlucky)  # noqa: B010  # a module's, and not its own

    def on_step(step: int) -> None:
        time.sleep(float(seconds))
        if fault and step == 3:
            FAULTS[fault[0]]()

    settings = WorkerSettings(artifacts_url=Path(artifacts).resolve().as_uri())
    ids = configure_logging(settings.log_format)
    engine, store = FakeEngine(on_step), FolderArtifactStore(Path(artifacts))
    with closing(connect(redis_url)) as redis:
        status = serve.serve(serve.ServeContext(engine, redis, store), settings, ids)
    sys.exit(status)


if __name__ == "__main__":
    main()
