"""Test event streams and readiness with real processes: several, one that ends, no Redis."""

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.record import Failure, Progress, Stage
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.live import events
from tests.conftest import free_port
from tests.support.http_service import address, service
from tests.support.killable_valkey import KillableValkey
from tests.support.sse_client import EventSource

STEPS = 40
FAILURE = Failure(code="generation_failed", detail="It did not work.")
Process = subprocess.Popen[str]


@pytest.fixture
def valkey_of_its_own(tmp_path: Path) -> Iterator[KillableValkey]:
    server = KillableValkey(tmp_path / "mortal", free_port())
    yield server
    server.thaw()
    server.kill()


@pytest.fixture
def environment(valkey_of_its_own: KillableValkey, tmp_path: Path) -> Mapping[str, str]:
    return {
        "REDIS_URL": valkey_of_its_own.url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_PORT": "0",
        "SERVICE_HEARTBEAT_S": "0.5",
    }


@pytest.fixture
def processes(environment: Mapping[str, str]) -> Iterator[dict[str, Process]]:
    """Two processes of the service by their URLs."""
    with ExitStack() as stack:
        started = [stack.enter_context(service(**environment)) for _ in range(2)]
        yield {address(process): process for process in started}


@pytest.fixture
def own_redis(valkey_of_its_own: KillableValkey) -> Iterator[Redis]:
    with valkey_of_its_own.connect() as redis:
        # Every write is on the disk before its answer, so that a killed server loses nothing.
        redis.config_set("appendfsync", "always")
        yield redis


@pytest.fixture
def own_store(own_redis: Redis) -> JobStore:
    return JobStore(own_redis)


@pytest.fixture
def own_job(own_store: JobStore, request_for_video: GenerationRequest) -> str:
    return own_store.create(request_for_video, "q").job.id


def run_job(store: JobStore, job_id: str, pause_s: float = 0.02) -> None:
    """Run a job step by step, until it fails."""
    attempt = store.claim(job_id, "w")
    for number in range(1, STEPS + 1):
        store.progress(attempt, Progress(stage=Stage.DENOISE, step=number, steps=STEPS))
        time.sleep(pause_s)
    store.fail(attempt, FAILURE)


def ids(redis: Redis, job_id: str) -> list[str]:
    entries = events.decode(redis.xrange(redis_keys.events(job_id)))
    assert len(entries) == STEPS + 3
    return [entry.event_id for entry in entries]


def end(process: Process) -> tuple[float, str]:
    """End a process by SIGTERM; return the seconds that took and its log."""
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    return time.monotonic() - begun, log


def test_every_process_sends_every_event_once_and_in_order(
    processes: dict[str, Process], own_redis: Redis, own_store: JobStore, own_job: str
) -> None:
    here, there = processes
    sources = [
        EventSource([here], own_job),
        EventSource([there], own_job),
        # Disconnects after every few events, and reconnects to the other process.
        EventSource([here, there], own_job, cut_after=1),
        EventSource([there, here], own_job, cut_after=3),
    ]
    for source in sources:
        source.start()
    run_job(own_store, own_job)
    for source in sources:
        assert [each.id for each in source.finish()] == ids(own_redis, own_job)
    assert sources[2].connections == STEPS + 4


def test_streams_outlive_a_killed_redis(
    processes: dict[str, Process],
    valkey_of_its_own: KillableValkey,
    own_redis: Redis,
    own_store: JobStore,
    own_job: str,
) -> None:
    sources = [EventSource([url], own_job) for url in processes for _ in range(5)]
    for source in sources:
        source.start()
    wait_until(lambda: all(source.sent for source in sources))
    attempt = own_store.claim(own_job, "w")
    wait_until(lambda: all(len(source.sent) == 2 for source in sources))
    valkey_of_its_own.kill()
    comments = [source.comments for source in sources]
    wait_until(lambda: all(s.comments > c for s, c in zip(sources, comments, strict=True)))
    valkey_of_its_own.start()
    own_store.progress(attempt, Progress(stage=Stage.VAE, step=1, steps=1))
    wait_until(lambda: all(len(source.sent) == 3 for source in sources))
    own_store.fail(attempt, FAILURE)
    for source in sources:
        assert [each.kind_and_state for each in source.finish()] == [
            ("state", "queued"),
            ("state", "running"),
            ("progress", "running"),
            ("state", "failed"),
        ]
        # One stream to the end, and one more request that was answered with 204.
        assert source.connections == 2
    for process in processes.values():
        _, log = end(process)
        assert "Traceback" not in log
        assert log.count("Events cannot be followed for now") == 1
        assert log.count("following events again") == 1


def test_messages_that_are_missed_cost_nothing(
    processes: dict[str, Process], own_redis: Redis, own_store: JobStore, own_job: str
) -> None:
    sources = [EventSource([url], own_job) for url in processes]
    for source in sources:
        source.start()
    wait_until(lambda: all(source.sent for source in sources))
    for _ in range(10):
        own_redis.client_kill_filter(_type="pubsub")
        own_redis.xadd(
            redis_keys.events(own_job),
            {
                "kind": "state",
                "state": "queued",
                "attempts": 0,
                "at": "2026-11-22T14:14:16Z",
                "progress": "",
            },
        )
        time.sleep(0.05)
    wait_until(lambda: all(len(source.sent) == 11 for source in sources))
    own_store.cancel(own_job)
    for source in sources:
        found = [each.id for each in source.finish()]
        assert len(found) == len(set(found)) == 12
        assert found == sorted(found, key=lambda each: tuple(map(int, each.split("-"))))


def test_open_streams_do_not_keep_a_process_and_go_on_at_another(
    processes: dict[str, Process], own_redis: Redis, own_store: JobStore, own_job: str
) -> None:
    (here, first), (there, second) = processes.items()
    sources = [EventSource([here, there], own_job) for _ in range(20)]
    for source in sources:
        source.start()
    wait_until(lambda: all(source.sent for source in sources))
    seconds, log = end(first)
    assert seconds < 3
    assert "Traceback" not in log
    assert "Cancel" not in log
    run_job(own_store, own_job, pause_s=0.005)
    for source in sources:
        assert [each.id for each in source.finish()] == ids(own_redis, own_job)
    seconds, log = end(second)
    assert seconds < 3
    assert "Traceback" not in log


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_process_ends_though_redis_does_not_answer(
    processes: dict[str, Process],
    valkey_of_its_own: KillableValkey,
    own_job: str,
    fault: str,
) -> None:
    url, process = next(iter(processes.items()))
    sources = [EventSource([url], own_job) for _ in range(20)]
    for source in sources:
        source.start()
    wait_until(lambda: all(source.sent for source in sources))
    getattr(valkey_of_its_own, fault)()
    time.sleep(1.5)  # by now the streams have tried to read, and failed
    seconds, log = end(process)
    assert seconds < 8  # includes the wait for background tasks
    assert "Traceback" not in log
    assert "Cancel" not in log


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_dead_redis_is_noticed_soon(
    processes: dict[str, Process],
    valkey_of_its_own: KillableValkey,
    own_redis: Redis,
    offer: WorkerOffer,
    own_job: str,
    fault: str,
) -> None:
    url = next(iter(processes))
    client = httpx2.Client(base_url=url, trust_env=False, verify=False, timeout=60)
    with client, ThreadPoolExecutor(60) as pool:
        assert client.get("/readyz").json()["code"] == "no_live_worker"
        catalog.publish(own_redis, offer)
        assert client.get("/readyz").json() == {"status": "ready", "workers": 1, "degraded": 1}
        assert client.get(f"/jobs/{own_job}").status_code == 200
        getattr(valkey_of_its_own, fault)()
        # More than there are threads for requests: all of them wait for Redis.
        stuck = [pool.submit(client.get, f"/jobs/{own_job}") for _ in range(60)]
        for _ in range(3):
            begun = time.monotonic()
            answer = client.get("/readyz")
            assert time.monotonic() - begun < 4
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert client.get("/healthz").status_code == 200
        if fault == "kill":
            valkey_of_its_own.start()
        else:
            valkey_of_its_own.thaw()
        assert {each.result(60).status_code for each in stuck} <= {200, 503}
        catalog.publish(own_redis, offer)
        assert client.get("/readyz").json() == {"status": "ready", "workers": 1, "degraded": 1}
