"""Test broken connections: what is repeated, what is not, and what happens to a job."""

import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError
from rq import Queue

from deploy.local import valkey
from deploy.local.ports import LOOPBACK
from jobs.record import StageTimings, Video
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore

VIDEO = Video(key="videos/x/1.mp4", bytes=1, sha256="0", width=1, height=1, num_frames=1, fps=8)
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


class LosingProxy:
    """A TCP proxy before Valkey that can lose one response: it closes the connection instead.

    `lose_response_to(word)` arms it for the next data from a client that contains `word`.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._word: bytes | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def lose_response_to(self, word: bytes) -> None:
        self._word = word

    @property
    def has_lost(self) -> bool:
        return self._word is None

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()

    def _accept(self) -> None:
        threads = []
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            threads.append(threading.Thread(target=self._serve, args=(client,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, client: socket.socket) -> None:
        """Forward in both directions: a large request, such as a script, comes in pieces."""
        losing = False
        with client, socket.create_connection(self._upstream) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if client in ready:
                    if not (data := client.recv(1 << 20)):
                        return
                    losing = losing or (self._word is not None and self._word in data)
                    server.sendall(data)
                if server in ready:
                    if not (response := server.recv(1 << 20)):
                        return
                    if losing:
                        self._word = None
                        return
                    client.sendall(response)


@pytest.fixture
def proxy(redis_url: str) -> Iterator[LosingProxy]:
    parts = urlsplit(redis_url)
    proxy = LosingProxy((str(parts.hostname), int(parts.port or 0)))
    yield proxy
    proxy.close()


@pytest.fixture
def lossy(proxy: LosingProxy) -> Iterator[JobStore]:
    """A store whose connection goes through the proxy."""
    with connect(proxy.url) as connection:
        yield JobStore(connection)


def test_lost_response_to_a_creation_makes_one_job(
    proxy: LosingProxy, lossy: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    warm = lossy.create(request_for_video, "warm").job  # loads the script
    proxy.lose_response_to(b"EVALSHA")
    job = lossy.create(request_for_video, "q").job
    assert proxy.has_lost
    assert Queue("q", connection=redis).job_ids == [job.id]
    assert {each.id for each in lossy.list().jobs} == {warm.id, job.id}


def test_lost_response_to_a_claim_is_still_one_attempt(
    proxy: LosingProxy, lossy: JobStore, store: JobStore, request_for_video: GenerationRequest
) -> None:
    job = store.create(request_for_video, "q").job
    warm = store.create(request_for_video, "q").job
    lossy.claim(warm.id, "w")  # loads the script, so that the next call is a single request
    proxy.lose_response_to(b"EVALSHA")
    attempt = lossy.claim(job.id, "w")
    assert proxy.has_lost
    assert attempt.number == 1
    assert store.get(job.id).attempts == 1
    lossy.succeed(attempt, VIDEO, TIMINGS)


def test_lost_response_to_an_ending_is_no_error(
    proxy: LosingProxy, lossy: JobStore, store: JobStore, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(store.create(request_for_video, "q").job.id, "w")
    store.succeed(store.claim(store.create(request_for_video, "q").job.id, "w"), VIDEO, TIMINGS)
    proxy.lose_response_to(b"EVALSHA")
    lossy.succeed(attempt, VIDEO, TIMINGS)
    assert proxy.has_lost
    assert store.get(attempt.job_id).state is JobState.SUCCEEDED


def test_no_server(unused_port: int) -> None:
    client = connect(f"redis://127.0.0.1:{unused_port}/0")
    with pytest.raises(RedisConnectionError):
        client.ping()
    client.close()


def test_a_server_that_has_become_a_replica_is_asked_again_over_a_new_connection(
    tmp_path: Path, unused_port: int
) -> None:
    command = valkey.server_command(tmp_path, unused_port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            while not valkey.answers(unused_port):
                assert server.poll() is None
                time.sleep(0.02)
            with connect(f"redis://{LOOPBACK}:{unused_port}/0") as redis:
                before = redis.client_id()
                redis.replicaof(LOOPBACK, 1)
                with pytest.raises(ReadOnlyError):
                    redis.set("key", "value")
                assert redis.client_id() != before
                stats = redis.info("commandstats")["cmdstat_set"]
                assert stats["calls"] + stats["rejected_calls"] == 2
        finally:
            server.kill()
