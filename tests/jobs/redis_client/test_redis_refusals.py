"""Test what a real Valkey says when it refuses: what may go away is waited for, the rest is not."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from redis._parsers.base import BaseParser
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from rq import Queue

from deploy.local import valkey
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.waiting import wait_until
from jobs.record import StageTimings, Video
from jobs.redis_client import connect, explain, is_transient
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import Recovery
from tests.jobs.redis_client.refusing_valkey import (
    FAULTS,
    Server,
    demote,
    forget_scripts,
    running_server,
)
from tests.support.requests import generation_request
from worker.process.redis_retry import RedisOutage, retry_until_answered

VIDEO = Video(key="videos/x/1.mp4", bytes=1, sha256="0", width=1, height=1, num_frames=1, fps=8)
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


@pytest.fixture
def server(tmp_path: Path, unused_port: int) -> Iterator[Server]:
    with running_server(tmp_path / "valkey", unused_port) as server:
        yield server


def refusal_of(call: Callable[[], object]) -> RedisError:
    with pytest.raises(RedisError) as caught:
        call()
    return caught.value


def in_a_transaction(redis: Redis) -> object:
    with redis.pipeline(transaction=True) as pipe:
        pipe.set("key", "value")
        return pipe.execute()


@pytest.mark.parametrize("code", FAULTS)
def test_a_finished_video_is_recorded_once_redis_takes_it(server: Server, code: str) -> None:
    """Each refusal comes from a script, as all outcomes are written by one."""
    begin, end = FAULTS[code]
    with connect(server.url) as redis:
        store = JobStore(redis)
        attempt = store.claim(store.create(generation_request(), "queue").job.id, "w")
        store.succeed(
            store.claim(store.create(generation_request(), "queue").job.id, "w"), VIDEO, TIMINGS
        )  # so that the script is there
        begin(server)
        refusals: list[RedisError] = []

        def succeed() -> None:
            try:
                store.succeed(attempt, VIDEO, TIMINGS)
            except RedisError as error:
                refusals.append(error)
                if len(refusals) == 2:
                    end(server)
                raise

        retry_until_answered(succeed, RedisOutage())
        assert len(refusals) >= 2
        assert code in (refusals[0].status_code or str(refusals[0]))
        assert store.get(attempt.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("code", FAULTS)
def test_a_refusal_is_transient_however_the_command_was_sent(server: Server, code: str) -> None:
    begin, end = FAULTS[code]
    with connect(server.url) as redis:
        script = redis.register_script("return redis.call('SET', 'key', 'value')")
        script()
        begin(server)
        for call in (lambda: redis.set("key", "1"), script, lambda: in_a_transaction(redis)):
            error = refusal_of(call)
            assert is_transient(error), (type(error), str(error))
        end(server)
        wait_until(lambda: not refused(redis), 30)


def refused(redis: Redis) -> bool:
    try:
        redis.set("key", "1")
    except RedisError:
        return True
    return False


def test_scripts_that_are_gone_are_loaded_again(server: Server) -> None:
    with connect(server.url) as redis:
        script = redis.register_script("return 7")
        assert script() == 7
        forget_scripts(server)
        error = refusal_of(lambda: redis.evalsha(script.sha, 0))
        assert error.status_code == "NOSCRIPT"
        assert is_transient(error)
        assert script() == 7


def test_a_server_that_is_loading_its_data_is_waited_for(tmp_path: Path, unused_port: int) -> None:
    command = valkey.server_command(tmp_path, unused_port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: valkey.answers(unused_port), 30)
        with (
            Redis(host=LOOPBACK, port=unused_port) as redis,
            redis.pipeline(transaction=False) as pipe,
        ):
            for number in range(6000):
                pipe.set(f"key-{number}", "value")
            pipe.execute()
        process.kill()
    slowly = [*command, "--key-load-delay", "300"]
    with subprocess.Popen(slowly, stdout=subprocess.DEVNULL) as process:
        try:
            refusals: list[RedisError] = []
            with Redis(
                host=LOOPBACK, port=unused_port, socket_timeout=30, retry=Retry(NoBackoff(), 0)
            ) as redis:

                def read() -> object:
                    try:
                        return redis.get("key-1")
                    except RedisError as error:
                        refusals.append(error)
                        raise

                assert retry_until_answered(read, RedisOutage()) == b"value"
            assert "LOADING" in {error.status_code for error in refusals}
        finally:
            process.kill()


def test_a_cluster_that_is_down_is_waited_for(tmp_path: Path, unused_port: int) -> None:
    # Named, because the default is 10,000 above the port, where there may be no port.
    cluster = ("--cluster-enabled", "yes", "--cluster-port", str(find_free_port()))
    command = [*valkey.server_command(tmp_path, unused_port), *cluster]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: valkey.answers(unused_port), 30)
            with Redis(host=LOOPBACK, port=unused_port) as redis:
                error = refusal_of(lambda: redis.get("key"))
                assert error.status_code == "CLUSTERDOWN"
                assert is_transient(error)
        finally:
            process.kill()


def test_a_wait_that_a_failover_ends_is_repeated(server: Server) -> None:
    caught: list[RedisError] = []

    def wait() -> None:
        with Redis(host=LOOPBACK, port=server.port) as waiting:
            caught.append(refusal_of(lambda: waiting.blmove("from", "to", timeout=30)))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: server.redis.info("clients")["blocked_clients"] == 1, 30)
    demote(server)
    thread.join(30)
    assert str(caught[0]).startswith("UNBLOCKED")
    assert is_transient(caught[0])


def test_our_script_that_an_operator_killed_is_run_again(server: Server) -> None:
    server.redis.config_set("busy-reply-threshold", 10)
    caught: list[RedisError] = []

    def run() -> None:
        with Redis(host=LOOPBACK, port=server.port) as other:
            caught.append(refusal_of(lambda: other.eval("while true do end", 0)))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: killed(server), 30)
    thread.join(30)
    assert is_transient(caught[0]), str(caught[0])


def killed(server: Server) -> bool:
    with suppress(RedisError):
        return bool(server.redis.execute_command("SCRIPT", "KILL"))
    return False


def test_a_server_with_too_many_clients_is_waited_for(server: Server) -> None:
    assert server.redis.ping()
    server.redis.config_set("maxclients", 1)
    with Redis(host=LOOPBACK, port=server.port, retry=Retry(NoBackoff(), 0)) as second:
        assert is_transient(refusal_of(second.ping))


@pytest.mark.parametrize(
    "said",
    [
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "ERR max number of clients + cluster connections reached",
        "EXECABORT Transaction discarded because of: OOM command not allowed when used memory > "
        "'maxmemory'.",
        # Redis 6.2 wraps the error of a command in a script.
        "ERR Error running script (call to f_0a1b): @user_script:12: @user_script: 12: -READONLY "
        "You can't write against a read only replica.",
        "ERR Error running script (call to f_0a1b): @user_script:3: @user_script: 3: -OOM command "
        "not allowed when used memory > 'maxmemory'.",
        "ERR Error running script (call to f_0a1b): @user_script:1: Script killed by user with "
        "SCRIPT KILL...",
    ],
)
def test_what_other_servers_say_is_transient_too(said: str) -> None:
    assert is_transient(BaseParser.parse_error(said))


@pytest.mark.parametrize(
    "error", [RedisConnectionError("reset"), RedisTimeoutError("late"), InvalidResponse("garbled")]
)
def test_a_broken_connection_is_transient(error: RedisError) -> None:
    assert is_transient(error)


def no_password(server: Server) -> Redis:
    server.redis.config_set("requirepass", "secret")
    return Redis(host=LOOPBACK, port=server.port)


def wrong_password(server: Server) -> Redis:
    server.redis.config_set("requirepass", "secret")
    return Redis(host=LOOPBACK, port=server.port, password="other")


def no_permission(server: Server) -> Redis:
    server.redis.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "+ping", "+@connection")
    return Redis(host=LOOPBACK, port=server.port, username="bob", password="pw")


def no_permission_in_a_script(server: Server) -> Redis:
    rules = ("on", ">pw", "+eval", "+@connection", "~*")
    server.redis.execute_command("ACL", "SETUSER", "bob", *rules)
    return Redis(host=LOOPBACK, port=server.port, username="bob", password="pw")


def another_type(server: Server) -> Redis:
    server.redis.rpush("key", "1")
    return Redis(host=LOOPBACK, port=server.port)


@pytest.mark.parametrize(
    ("prepare", "code", "remedy"),
    [
        (no_password, "NOAUTH", "Put the password of this Redis into REDIS_URL"),
        (wrong_password, "WRONGPASS", "Put the right user and password into REDIS_URL"),
        (no_permission, "NOPERM", "ACL SETUSER"),
        (no_permission_in_a_script, "bob has no permissions", "ACL SETUSER"),
        (another_type, "WRONGTYPE", "use one of its own"),
    ],
)
def test_what_redis_refuses_for_good_ends_at_once_with_a_sentence(
    server: Server,
    prepare: Callable[[Server], Redis],
    code: str,
    remedy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []
    outage = RedisOutage()
    with prepare(server) as redis:

        def read() -> object:
            calls.append(1)
            if prepare is no_permission_in_a_script:
                return redis.eval("return redis.call('GET', 'key')", 0)
            return redis.get("key")

        for _ in range(2):
            with pytest.raises(RedisError) as caught:
                retry_until_answered(read, outage)
    assert len(calls) == 2, "one for each of our two tries"
    sentence = explain(caught.value)
    assert sentence.startswith("Redis refuses a command for good: ")
    assert code in sentence
    assert remedy in sentence
    assert [each for each in caplog.messages if each == sentence] == [sentence], "said once"
    assert not any("is away" in each for each in caplog.messages)


def test_a_redirection_to_another_node_is_explained() -> None:
    for said in ("MOVED 3999 127.0.0.1:6381", "ASK 3999 127.0.0.1:6381"):
        error = BaseParser.parse_error(said)
        assert not is_transient(error)
        assert "sharded cluster" in explain(error)


def test_no_value_of_a_pipeline_is_told(server: Server) -> None:
    server.redis.rpush("key", "1")
    with server.redis.pipeline(transaction=False) as pipe:
        pipe.incrby("key", 424242)
        error = refusal_of(pipe.execute)
    assert "424242" in str(error)
    assert "424242" not in explain(error)


@pytest.mark.parametrize("code", ["OOM", "MASTERDOWN", "NOREPLICAS"])
def test_recovery_blames_no_record_for_what_redis_refuses(
    server: Server, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin, end = FAULTS[code]
    with connect(server.url) as redis:
        store, recovery = JobStore(redis), Recovery(redis)
        job_id = store.create(generation_request(), "queue").job.id
        redis.delete(Queue("queue", connection=redis).key)
        begin(server)
        assert is_transient(refusal_of(recovery.run))
        end(server)
        assert recovery.run() == {}
        assert not any(job_id in each for each in caplog.messages)
