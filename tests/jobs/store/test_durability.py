"""Test that risky settings of Redis are named, and that a new job waits for what is asked for."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from deploy.local import valkey
from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.errors import StoreUnavailable
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from jobs.store.durability import LONGEST_WAIT_MS, Durability, read_risks
from jobs.store.job_store import JobStore
from jobs.store.submission import Idempotency, Submission
from tests.conftest import free_port


@pytest.fixture
def changed(redis: Redis) -> Iterator[Redis]:
    """A server whose settings may be changed; they are as before after the test."""
    yield redis
    redis.config_set("maxmemory-policy", "noeviction")
    redis.config_set("appendonly", "yes")
    redis.acl_deluser("limited")


def limited(redis: Redis, url: str, *commands: str) -> Redis:
    """Connect as a user who may do everything but these commands, as managed servers have it."""
    redis.acl_setuser(
        "limited", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=commands
    )
    return Redis.from_url(url, username="limited", password="none")


def settings_of(redis: Redis) -> list[str]:
    return [risk.setting for risk in read_risks(redis)]


def test_safe_settings_are_no_risk(redis: Redis) -> None:
    assert read_risks(redis) == ()


@pytest.mark.parametrize("denied", [(), ("-config",), ("-info",)], ids=str)
def test_each_risky_setting_is_named_with_what_to_set(
    changed: Redis, redis_url: str, denied: tuple[str, ...]
) -> None:
    changed.config_set("maxmemory-policy", "allkeys-lru")
    changed.config_set("appendonly", "no")
    with limited(changed, redis_url, *denied) as user:
        policy, append_only = read_risks(user)
    assert (policy.setting, append_only.setting) == ("maxmemory-policy", "appendonly")
    assert "is allkeys-lru" in policy.detail
    assert "Set it to noeviction." in policy.detail
    assert "Set it to yes." in append_only.detail


def test_settings_that_cannot_be_read_are_said_to_be_so(changed: Redis, redis_url: str) -> None:
    with limited(changed, redis_url, "-config", "-info") as user:
        (unchecked,) = read_risks(user)
    assert unchecked.setting == "unchecked"
    assert "maxmemory-policy and appendonly" in unchecked.detail


class Servers:
    """A primary and a replica of it, which may be stopped and continued."""

    def __init__(self, folder: Path) -> None:
        self.port, replica_port = free_port(), free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.processes = []
        for port, options in ((self.port, ()), (replica_port, ("--replicaof", "127.0.0.1"))):
            place = folder / str(port)
            place.mkdir()
            more = [*options, str(self.port)] if options else []
            command = [*valkey.server_command(place, port), *more]
            self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            wait_until(lambda port=port: valkey.answers(port), 30, "Valkey answers")  # type: ignore[misc]
        with connect(self.url) as redis:
            wait_until(lambda: redis.wait(1, 100) == 1, 60, "the replica follows")

    def stop_replica(self) -> None:
        self.processes[1].send_signal(signal.SIGSTOP)

    def continue_replica(self) -> None:
        self.processes[1].send_signal(signal.SIGCONT)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.end()


def test_a_job_is_answered_only_once_a_replica_has_it(
    servers: Servers, request_for_video: GenerationRequest
) -> None:
    keyed = Submission(idempotency=Idempotency("key", "body"))
    with connect(servers.url) as redis:
        store = JobStore(redis, Durability(replicas=1, wait_ms=LONGEST_WAIT_MS))
        first = store.create(request_for_video, "q").job
        assert store.get(first.id) == first

        servers.stop_replica()
        hasty = JobStore(redis, Durability(replicas=1, wait_ms=50))
        with pytest.raises(StoreUnavailable, match="may still run") as refused:
            hasty.create(request_for_video, "q", keyed)
        job_id = str(refused.value.context["job_id"])
        assert job_id in refused.value.detail
        assert store.get(job_id).id == job_id, "it was created, and the caller was told its id"
        assert keyed.idempotency is not None
        for again in (
            lambda: hasty.create(request_for_video, "q", keyed),
            lambda: hasty.replay(keyed.owner, keyed.idempotency),
        ):
            with pytest.raises(StoreUnavailable, match=job_id):
                again()
        servers.continue_replica()
        found = store.replay(keyed.owner, keyed.idempotency)
        assert found is not None
        assert found.job.id == job_id
        assert redis.zcard(redis_keys.index("all")) == 2


def test_replicas_that_are_not_waited_for_are_a_risk(servers: Servers) -> None:
    with connect(servers.url) as redis:
        (risk,) = read_risks(redis)
        assert (risk.setting, "fail-over" in risk.detail) == ("replicas", True)
        assert read_risks(redis, Durability(replicas=1)) == ()
        (risk,) = read_risks(redis, Durability(replicas=2))
        assert "no job can be confirmed" in risk.detail


def test_a_job_is_answered_only_once_it_is_on_disk(
    changed: Redis, request_for_video: GenerationRequest
) -> None:
    """This Valkey syncs every second."""
    store = JobStore(changed, Durability(aof=True, wait_ms=LONGEST_WAIT_MS))
    store.create(request_for_video, "q")
    assert changed.waitaof(1, 0, 0)[0] == 1
    changed.config_set("appendonly", "no")
    with pytest.raises(StoreUnavailable):
        store.create(request_for_video, "q")
    (risk,) = read_risks(changed, Durability(aof=True))
    assert "REDIS_WAIT_AOF" in risk.detail


def test_a_job_that_another_primary_does_not_have_is_not_confirmed(redis: Redis) -> None:
    """A replica took over between the creation and the wait."""
    with pytest.raises(StoreUnavailable):
        Durability(aof=True).confirm(redis, "01a2")


def test_nothing_is_sent_if_nothing_is_asked_for(redis: Redis) -> None:
    Durability().confirm(redis, "01a2")
    assert not redis.exists(redis_keys.CONFIRMED)
