"""Define fixtures of the front end's tests: API keys, and jobs with or without a video."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.artifacts.store import open_artifacts
from jobs.record import JobRecord, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from service.auth.api_keys import KeyStore, Role
from service.settings import ServiceSettings

MakeKey = Callable[..., dict[str, str]]
SignIn = Callable[..., dict[str, str]]
MakeJob = Callable[..., JobRecord]

VIDEO_BYTES = bytes(range(256)) * 8
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


@pytest.fixture
def key_store(redis: Redis) -> KeyStore:
    return KeyStore(redis)


@pytest.fixture
def make_key(key_store: KeyStore) -> MakeKey:
    """Make a key, and return the header that sends it."""

    def make(name: str, role: Role = Role.USER, **limits: object) -> dict[str, str]:
        _, token = key_store.add(name, role, **limits)  # type: ignore[arg-type]
        return {"Authorization": f"Bearer {token}"}

    return make


@pytest.fixture
def sign_in(client: TestClient) -> SignIn:
    """Sign in with the header of a key, and return the headers that a browser's page sends."""

    def sign_in(key: dict[str, str], at: TestClient | None = None) -> dict[str, str]:
        answer = (at or client).post("/session", headers=key)
        assert answer.status_code == 200, answer.text
        (at or client).cookies.clear()  # tests say themselves which cookie is sent
        return {"Cookie": cookie_in(answer), "Sec-Fetch-Site": "same-origin"}

    return sign_in


def cookie_in(answer: httpx2.Response) -> str:
    """Return what a browser sends back of the cookie in an answer."""
    return answer.headers["set-cookie"].partition(";")[0]


@pytest.fixture
def make_job(
    store: JobStore,
    settings: ServiceSettings,
    request_for_video: GenerationRequest,
    tmp_path: Path,
) -> MakeJob:
    """Make a job, by default a queued one; one with a video has succeeded."""

    def make(
        owner: str = "local", *, video: bool = False, webhook_url: str | None = None
    ) -> JobRecord:
        terms = Submission(owner=owner, webhook_url=webhook_url)
        job = store.create(request_for_video, "q", terms).job
        if not video:
            return job
        attempt = store.claim(job.id, "w")
        made = tmp_path / f"{job.id}.mp4"
        made.write_bytes(VIDEO_BYTES)
        key = f"videos/{job.id}/1.mp4"
        open_artifacts(settings.artifacts_url).put(key, made)
        sha256 = hashlib.sha256(VIDEO_BYTES).hexdigest()
        size = {"width": 96, "height": 96, "num_frames": 17, "fps": 8}
        store.succeed(
            attempt, Video(key=key, bytes=len(VIDEO_BYTES), sha256=sha256, **size), TIMINGS
        )
        return store.get(job.id)

    return make
