"""Broken connections: what is repeated, what is not, and what it does to a job."""

import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq import Queue

from jobs.connection import connect
from jobs.record import StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store import JobStore

VIDEO = Video(key="videos/x/1.mp4", bytes=1, sha256="0", width=1, height=1, num_frames=1, fps=8)
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


class LosingProxy:
    """A TCP proxy before Valkey which can lose one answer: the command runs, the caller sees a cut.

    `lose_answer_to(word)` arms it for the next data from a client that contains `word`.
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

    def lose_answer_to(self, word: bytes) -> None:
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
        """One request, one answer: the store's clients never send ahead."""
        with client, socket.create_connection(self._upstream) as server:
            while data := client.recv(1 << 20):
                losing = self._word is not None and self._word in data
                server.sendall(data)
                answer = server.recv(1 << 20)
                if losing:
                    self._word = None
                    return
                client.sendall(answer)


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


def test_lost_answer_to_a_creation_makes_one_job(
    proxy: LosingProxy, lossy: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    warm = lossy.create(request_for_video, "warm").job  # loads the script
    proxy.lose_answer_to(b"EVALSHA")
    job = lossy.create(request_for_video, "q").job
    assert proxy.has_lost
    assert Queue("q", connection=redis).job_ids == [job.id]
    assert {each.id for each in lossy.list().jobs} == {warm.id, job.id}


def test_lost_answer_to_a_claim_is_still_one_attempt(
    proxy: LosingProxy, lossy: JobStore, store: JobStore, request_for_video: GenerationRequest
) -> None:
    job = store.create(request_for_video, "q").job
    warm = store.create(request_for_video, "q").job
    lossy.claim(warm.id, "w")  # loads the script, so that the next call is a single request
    proxy.lose_answer_to(b"EVALSHA")
    attempt = lossy.claim(job.id, "w")
    assert proxy.has_lost
    assert attempt.number == 1
    assert store.get(job.id).attempts == 1
    lossy.succeed(attempt, VIDEO, TIMINGS)


def test_lost_answer_to_an_ending_is_no_error(
    proxy: LosingProxy, lossy: JobStore, store: JobStore, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(store.create(request_for_video, "q").job.id, "w")
    store.succeed(store.claim(store.create(request_for_video, "q").job.id, "w"), VIDEO, TIMINGS)
    proxy.lose_answer_to(b"EVALSHA")
    lossy.succeed(attempt, VIDEO, TIMINGS)
    assert proxy.has_lost
    assert store.get(attempt.job_id).state is JobState.SUCCEEDED


def test_nobody_there(unused_port: int) -> None:
    nobody = connect(f"redis://127.0.0.1:{unused_port}/0")
    with pytest.raises(RedisConnectionError):
        nobody.ping()
    nobody.close()
