"""Define fixtures of the front end's tests: API keys, and jobs with or without a video."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.artifacts.store import artifact_key, open_artifacts, spritesheet_key, thumbnail_key
from jobs.record import JobRecord, Picture, Spritesheet, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.live.previews import PreviewWriter
from jobs.store.submission import Submission
from service.auth.api_keys import KeyStore, Role
from service.settings import ServiceSettings

MakeKey = Callable[..., dict[str, str]]
SignIn = Callable[..., dict[str, str]]
MakeJob = Callable[..., JobRecord]

VIDEO_BYTES = bytes(range(256)) * 8
THUMBNAIL_BYTES = b"a thumbnail" * 20
PREVIEW_BYTES = b"a preview" * 30
SPRITESHEET_BYTES = b"a spritesheet" * 40
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
    redis: Redis,
    settings: ServiceSettings,
    request_for_video: GenerationRequest,
    tmp_path: Path,
) -> MakeJob:
    """Make a job, by default a queued one; one with a video has succeeded, and has pictures.

    One with a preview runs.
    """

    def put(key: str, data: bytes) -> dict[str, Any]:
        made = tmp_path / "made"
        made.write_bytes(data)
        open_artifacts(settings.artifacts_url).put(key, made)
        return {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def make(
        owner: str = "local",
        *,
        video: bool = False,
        pictures: bool = True,
        preview: bool = False,
        webhook_url: str | None = None,
    ) -> JobRecord:
        terms = Submission(owner=owner, webhook_url=webhook_url)
        job = store.create(request_for_video, "q", terms).job
        if preview:
            PreviewWriter(redis).write(store.claim(job.id, "w"), PREVIEW_BYTES)
            return store.get(job.id)
        if not video:
            return job
        attempt = store.claim(job.id, "w")
        size = {"width": 96, "height": 96, "num_frames": 17, "fps": 8}
        made = Video(**put(artifact_key(job.id, "1"), VIDEO_BYTES), **size)
        if pictures:
            thumbnail = put(thumbnail_key(job.id, "1"), THUMBNAIL_BYTES)
            sheet = put(spritesheet_key(job.id, "1"), SPRITESHEET_BYTES)
            grid = {"columns": 5, "rows": 4, "frame_width": 96, "frame_height": 96}
            made = made.model_copy(
                update={
                    "thumbnail": Picture(**thumbnail, width=96, height=96),
                    "spritesheet": Spritesheet(
                        **sheet, **grid, width=480, height=384, frames=tuple(range(17))
                    ),
                }
            )
        store.succeed(attempt, made, TIMINGS)
        return store.get(job.id)

    return make
