"""Back up Valkey and the artifact store under load, and restore both on a new server.

It does what docs/operations.md says under "Backup and restore", with a job that has ended, one that
runs, two that wait, and one that is accepted after the backup.
"""

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from benchmarks.serving.redis_dump import dump
from deploy.local import valkey
from deploy.local.cluster import Cluster
from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until
from service.auth.api_keys import KeyStore, Role

pytestmark = pytest.mark.slow

WORKER = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0.25")
BODY = {"prompt": "a small red circle", "num_inference_steps": 4}
LONG = {**BODY, "num_inference_steps": 40}


@dataclass
class Backup:
    """What was copied from a service that went on, and what it had at that moment."""

    aof: Path
    rdb: Path
    artifacts: Path
    key: str
    ended: dict[str, Any]
    running: str
    waiting: list[str]
    afterwards: str


class Caller:
    """Asks a cluster with a key."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self._cluster = cluster
        self._headers = {"Authorization": f"Bearer {key}"}

    def submit(self, body: dict[str, Any]) -> str:
        answer = self._cluster.request("POST", "/generate", json=body, headers=self._headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, path: str) -> httpx.Response:
        return self._cluster.request("GET", path, headers=self._headers)

    def wait_for(self, job_id: str, state: str) -> dict[str, Any]:
        job: dict[str, Any] = {}

        def reached() -> bool:
            job.update(self.get(f"/jobs/{job_id}").json())
            return bool(job["state"] == state)

        wait_until(reached, 90, f"job {job_id} is {state}", self._cluster.logs, every_s=0.2)
        return job


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backup]:
    """Take both kinds of copy while jobs wait and run, then let the whole service be killed."""
    folder, copies = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("copies")
    with Cluster(folder, apis=1, workers=1, worker=WORKER) as cluster:
        key = KeyStore(cluster.redis).add("alice", Role.OPS)[1]
        caller = Caller(cluster, key)
        ended = caller.wait_for(caller.submit(BODY), "succeeded")
        running = caller.submit(LONG)
        caller.wait_for(running, "running")
        waiting = [caller.submit(BODY) for _ in range(2)]
        copy_aof(cluster.redis, folder / "valkey", copies / "valkey")
        copy_rdb(cluster.redis, folder / "valkey", copies / "dump.rdb")
        shutil.copytree(cluster.artifacts, copies / "artifacts")
        assert caller.get(f"/jobs/{running}").json()["state"] == "running"
        afterwards = caller.submit(BODY)
        cluster.pause_restarts(*cluster.children)
        for name in cluster.children:
            cluster.kill(name)
    yield Backup(
        copies / "valkey",
        copies / "dump.rdb",
        copies / "artifacts",
        key,
        ended,
        running,
        waiting,
        afterwards,
    )
    shutil.rmtree(copies)


def copy_aof(redis: Redis, folder: Path, to: Path) -> None:
    """Copy the append-only file of a server that goes on: no rewrite may replace its parts."""
    client: Any = redis
    before = client.config_get("auto-aof-rewrite-percentage")
    client.config_set("auto-aof-rewrite-percentage", 0)
    wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 30, "no rewrite")
    shutil.copytree(folder / "appendonlydir", to / "appendonlydir")
    client.config_set("auto-aof-rewrite-percentage", before["auto-aof-rewrite-percentage"])


def copy_rdb(redis: Redis, folder: Path, to: Path) -> None:
    client: Any = redis
    client.bgsave()
    wait_until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], 30, "a snapshot")
    assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
    shutil.copy(folder / "dump.rdb", to)


class Server:
    """A Valkey over a folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = find_free_port()
        command = [*valkey.server_command(folder, port), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: valkey.answers(port), 30, "Valkey answers")
        self.redis: Any = Redis(port=port)

    def __enter__(self) -> Any:
        return self.redis

    def __exit__(self, *_: object) -> None:
        self.redis.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def restore_rdb(rdb: Path, folder: Path) -> None:
    """Load the snapshot without, and then turn it into an append-only file."""
    folder.mkdir(parents=True)
    shutil.copy(rdb, folder / "dump.rdb")
    with Server(folder, "--appendonly", "no") as redis:
        redis.config_set("appendonly", "yes")
        wait_until(lambda: not redis.info("persistence")["aof_rewrite_in_progress"], 30, "a file")
        assert redis.info("persistence")["aof_last_bgrewrite_status"] == "ok"


def test_a_service_goes_on_with_a_restored_server_and_store(backup: Backup, tmp_path: Path) -> None:
    shutil.copytree(backup.aof, tmp_path / "valkey")
    shutil.copytree(backup.artifacts, tmp_path / "artifacts")
    with Cluster(tmp_path, apis=1, workers=1, worker=WORKER) as cluster:
        caller = Caller(cluster, backup.key)
        ended = caller.get(f"/jobs/{backup.ended['id']}").json()
        assert ended["finished_at"] == backup.ended["finished_at"]
        video = caller.get(f"/jobs/{backup.ended['id']}/video.mp4").content
        assert hashlib.sha256(video).hexdigest() == backup.ended["video"]["sha256"]

        for job_id, attempts in ((backup.running, 2), *((each, 1) for each in backup.waiting)):
            job = caller.wait_for(job_id, "succeeded")
            assert (job["attempts"], job["lost"]) == (attempts, attempts - 1)
            assert cluster.end_states(job_id) == ["succeeded"]

        # What was accepted after the copy is not there.
        assert caller.get(f"/jobs/{backup.afterwards}").status_code == 404
        assert cluster.request("GET", "/jobs").status_code == 401


def test_a_snapshot_has_what_the_append_only_file_has(backup: Backup, tmp_path: Path) -> None:
    restore_rdb(backup.rdb, tmp_path / "from-snapshot")
    shutil.copytree(backup.aof, tmp_path / "from-file")
    found = []
    for name in ("from-snapshot", "from-file"):
        with Server(tmp_path / name) as redis:
            found.append({key: value for key, value in dump(redis).items() if is_kept(key)})
    assert found[0].keys() == found[1].keys()
    jobs = [backup.ended["id"], *backup.waiting]
    for key in ["wan:keys", "wan:jobs:queued", *(f"wan:job:{each}" for each in jobs)]:
        # The order of a hash is not kept.
        assert sorted(found[0][key]["value"]) == sorted(found[1][key]["value"]), key


def test_a_snapshot_beside_an_append_only_server_is_not_read(
    backup: Backup, tmp_path: Path
) -> None:
    """The trap that the runbook names: the server starts empty, and says nothing."""
    shutil.copy(backup.rdb, tmp_path / "dump.rdb")
    with Server(tmp_path) as redis:
        assert redis.dbsize() == 0


def is_kept(key: str) -> bool:
    """Whether a key lives longer than the seconds between the two copies and their loading."""
    return key.startswith(("wan:job:", "wan:jobs:", "wan:keys", "wan:artifacts:id", "wan:events:"))
