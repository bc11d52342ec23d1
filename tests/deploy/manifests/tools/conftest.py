"""Run two processes of the service, and a worker whose engine only waits."""

import sys
from collections.abc import Iterator

import pytest

from deploy.local.cluster import Cluster

WORKER = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0.3")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The system without a proxy, open to callers without a key, as it is on loopback."""
    with Cluster(tmp_path_factory.mktemp("site"), apis=2, workers=1, worker=WORKER) as cluster:
        yield cluster
