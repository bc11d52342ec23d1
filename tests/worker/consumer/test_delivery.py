"""Test that a worker runs nothing but its own task, whatever is put into its queue."""

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from jobs import catalog, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from jobs.store.rq_entry import TASK
from tests.support.requests import generation_request
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.fake_engine import FakeEngine

Run = Callable[[], None]
REQUEST = generation_request(model="fake", mode="plain", size="64x32", num_frames=9)
QUEUE = catalog.queue_name(FakeEngine.model, FakeEngine.modes)


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def run(redis: Redis, tmp_path: Path) -> Run:
    """Lets a new worker run all that is queued."""

    def run() -> None:
        engine = FakeEngine(lambda _: None)
        engine.device = Device("cpu", "none")
        worker = ResidentWorker(engine, redis, FolderArtifactStore(tmp_path / "artifacts"))
        worker.work(burst=True, logging_level="WARNING")

    return run


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that exists once something was run."""
    return tmp_path / "proof"


def packed(*parts: object) -> bytes:
    return zlib.compress(json.dumps(parts).encode())


def is_gone(redis: Redis, job_id: str) -> bool:
    queue = Queue(QUEUE, connection=redis)
    waiting = redis.llen(queue.key) + redis.llen(queue.intermediate_queue_key)
    return not waiting and not redis.exists(f"rq:job:{job_id}")


@pytest.mark.parametrize("task", ["os.mkdir", "os.system", "worker.tasks", "nowhere.at_all", TASK])
def test_another_function_is_not_run(
    run: Run, redis: Redis, proof: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As RQ's own client queues it; `TASK` with an argument that is not the id of the entry."""
    arguments = (f"touch {proof}",) if task == "os.system" else (str(proof),)
    job = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue(task, args=arguments)
    run()
    assert not proof.exists()
    assert is_gone(redis, job.id)
    assert f"RQ's entry '{job.id}' is removed and not run" in caplog.text


def test_pickled_data_is_not_unpickled(run: Run, redis: Redis, proof: Path) -> None:
    for data in (pickle.dumps(Touch(proof)), zlib.compress(pickle.dumps(Touch(proof)))):
        redis.hset("rq:job:evil", mapping={"data": data, "meta": pickle.dumps(Touch(proof))})
        redis.sadd("rq:queues", Queue(QUEUE, connection=redis).key)
        redis.rpush(Queue(QUEUE, connection=redis).key, "evil")
        run()
        assert not proof.exists()
        assert is_gone(redis, "evil")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        zlib.compress(b"0" * 50_000_000),
        zlib.compress(b"[" * 900),
        packed(TASK, "os", ["ID"], {}),
        packed(TASK, None, ["ID", "more"], {}),
        packed(TASK, None, ["ID"], {"job_id": "other"}),
        packed(TASK, None, {"job_id": "ID"}, {}),
        packed([TASK], None, ["ID"], {}),
    ],
    ids=range(9),
)
def test_data_that_the_service_does_not_write_is_removed_and_the_job_delivered_again(
    run: Run, redis: Redis, store: JobStore, data: bytes
) -> None:
    job_id = store.create(REQUEST, QUEUE).job.id
    if data and data[:1] == b"x" and len(data) < 1000:
        text = zlib.decompress(data)
        data = zlib.compress(text.replace(b'"ID"', json.dumps(job_id).encode()))
    redis.hset(f"rq:job:{job_id}", "data", data)
    run()
    assert is_gone(redis, job_id)
    assert store.get(job_id).state is JobState.QUEUED
    recovery = Recovery(redis)
    recovery.run()
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    assert recovery.run() == {job_id: "queued"}
    run()
    assert store.get(job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", "soon"), ("status", "odd"), ("created_at", "yesterday")]
)
def test_an_entry_that_rq_cannot_read_does_not_end_the_worker(
    run: Run, redis: Redis, store: JobStore, field: str, value: str
) -> None:
    broken = store.create(REQUEST, QUEUE).job.id
    sound = store.create(REQUEST, QUEUE).job.id
    redis.hset(f"rq:job:{broken}", field, value)
    run()
    assert store.get(sound).state is JobState.SUCCEEDED
    assert not redis.exists(f"rq:job:{broken}")


def test_callbacks_and_dependents_of_an_entry_are_not_called(
    run: Run, redis: Redis, store: JobStore, proof: Path
) -> None:
    """They are names of functions, too, which RQ imports and calls after the task."""
    job_id = store.create(REQUEST, QUEUE).job.id
    names = ("success_callback_name", "failure_callback_name", "stopped_callback_name")
    hooks = dict.fromkeys(names, "tests.worker.consumer.test_delivery.leave_a_proof")
    others = {"repeats_left": "3", "retries_left": "3", "meta": json.dumps(str(proof))}
    for name, value in (hooks | others).items():
        redis.hset(f"rq:job:{job_id}", name, value)
    run()
    assert store.get(job_id).state is JobState.SUCCEEDED
    assert CALLED == []


CALLED: list[object] = []


def leave_a_proof(*arguments: object) -> None:
    """What an entry names as its callback."""
    CALLED.append(arguments)
