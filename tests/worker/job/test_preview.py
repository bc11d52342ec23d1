"""Test previews of running jobs: how many bytes and how often, what they show, and what fails."""

import logging
import threading
import time
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from jobs import catalog, redis_keys
from jobs.artifacts.folder import FolderArtifactStore
from jobs.errors import StaleAttempt
from jobs.record import Attempt, JobRecord
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.live import events
from jobs.store.live.previews import MAX_PREVIEW_BYTES, PreviewWriter, read_preview
from tests.support.requests import generation_request
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine, OnStep
from worker.interface import PreviewClip, PreviewPace
from worker.job.preview import PreviewThread
from worker.job.webp_animation import LEVELS, WebpEncoder

REQUEST = generation_request(model="fake", mode="plain", size="64x32", num_frames=9, seed=200)
QUEUE = catalog.queue_name(FakeEngine.model, FakeEngine.modes)
EVERY_STEP = PreviewPace(every_steps=1, every_s=0.0)


def moving(frames: int = 5, height: int = 24, width: int = 40) -> PreviewClip:
    """A bright bar that moves to the right over a dark ground."""
    pictures = np.full((frames, height, width, 3), 40, np.uint8)
    for index, picture in enumerate(pictures):
        start = index * (width - 8) // max(1, frames - 1)
        picture[:, start : start + 8] = (230, 180, 90)
    return PreviewClip(pictures, 4.0)


def noise(frames: int, height: int, width: int) -> PreviewClip:
    shape = (frames, height, width, 3)
    return PreviewClip(np.random.default_rng(0).integers(0, 256, shape, np.uint8), 4.0)


def decoded(picture: bytes) -> tuple[np.ndarray, list[int]]:
    """Return the frames of a WebP, and how many milliseconds each is shown."""
    image, frames, shown_ms = Image.open(BytesIO(picture)), [], []
    assert image.format == "WEBP"
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
        shown_ms.append(int(image.info["duration"]))
    if len(frames) > 1:  # frames that are all the same become one
        assert image.info["loop"] == 0, "it is played over and over"
    return np.stack(frames), shown_ms


def test_a_preview_moves_as_its_frames_do() -> None:
    clip = moving()
    picture = WebpEncoder().encode(clip)
    assert picture is not None
    assert len(picture) <= MAX_PREVIEW_BYTES
    frames, shown_ms = decoded(picture)
    assert frames.shape == clip.frames.shape
    assert shown_ms == [250] * 5
    assert np.abs(frames.astype(int) - clip.frames).mean() < 8


def test_noise_of_the_largest_size_fits_as_well() -> None:
    # 81 frames of 1280x720, as the map makes them: two by two pixels of each latent position.
    encoder = WebpEncoder()
    picture = encoder.encode(noise(21, 180, 320))
    assert picture is not None
    assert 1000 < len(picture) <= MAX_PREVIEW_BYTES
    # The second time it begins where the first one ended.
    again = encoder.encode(noise(21, 180, 320))
    assert again is not None
    assert len(again) <= MAX_PREVIEW_BYTES


def test_no_preview_is_larger_than_allowed() -> None:
    clip = noise(5, 12, 20)
    whole = WebpEncoder().encode(clip)
    assert whole is not None
    smaller = WebpEncoder(len(whole) // 3).encode(clip)
    assert smaller is not None
    assert len(smaller) <= len(whole) // 3
    assert WebpEncoder(10).encode(clip) is None


def test_levels_only_take_away() -> None:
    for before, after in pairwise(LEVELS):
        assert after.longest_px <= before.longest_px
        assert after.quality <= before.quality
        assert after.every_frame >= before.every_frame


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return store.claim(store.create(REQUEST, QUEUE).job.id, "w")


def offered(previews: PreviewThread, step: int, steps: int = 20) -> bool:
    """Offer a preview after a step; return whether it was made."""
    made: list[int] = []

    def make() -> PreviewClip:
        made.append(step)
        return moving(2)

    previews.offer(step, steps, make)
    return bool(made)


def test_previews_come_at_their_pace_and_after_the_last_step(
    redis: Redis, attempt: Attempt
) -> None:
    clock = Clock()
    pace = PreviewPace(every_steps=3, every_s=2.0)
    previews = PreviewThread(pace, PreviewWriter(redis), attempt, clock)
    found = []
    for step in range(1, 21):
        clock.now += 0.5
        if offered(previews, step):
            found.append(step)
    assert found == [1, 5, 9, 13, 17, 20]
    clock = Clock()
    previews = PreviewThread(pace, PreviewWriter(redis), attempt, clock)
    found = []
    for step in range(1, 8):
        clock.now += 60
        if offered(previews, step):
            found.append(step)
    assert found == [1, 4, 7]


def wait_for(condition: Callable[[], object], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_what_fails_ends_the_previews_and_not_the_job(
    redis: Redis, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> PreviewClip:
        raise RuntimeError("no such kernel")

    with PreviewThread(EVERY_STEP, PreviewWriter(redis), attempt) as previews:
        previews.offer(1, 20, fail)
        assert not offered(previews, 2)
    assert caplog.text.count("no more previews") == 1
    assert "no such kernel" in caplog.text


def test_a_broken_ffmpeg_is_logged_once(
    redis: Redis,
    attempt: Attempt,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with PreviewThread(EVERY_STEP, PreviewWriter(redis), attempt) as previews:
        assert offered(previews, 1)
        wait_for(lambda: "no more previews" in caplog.text)
        wait_for(lambda: not offered(previews, 2))
    assert caplog.text.count("no more previews") == 1
    assert read_preview(redis, attempt.job_id) is None


def test_who_lost_the_job_writes_nothing_more(
    redis: Redis, store: JobStore, attempt: Attempt
) -> None:
    store.release(attempt)
    with PreviewThread(EVERY_STEP, PreviewWriter(redis), attempt) as previews:
        assert offered(previews, 1)
        wait_for(lambda: not offered(previews, 2))
    assert read_preview(redis, attempt.job_id) is None


def test_the_end_of_a_job_does_not_wait_for_a_preview(redis: Redis, attempt: Attempt) -> None:
    with PreviewThread(EVERY_STEP, PreviewWriter(redis), attempt) as previews:
        previews.offer(1, 20, lambda: noise(21, 180, 320))
        wait_for(lambda: previews._encoder._process is not None)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    assert not previews._thread.is_alive()


# ------------------------------------------------------------------ whole jobs


RunJob = Callable[[OnStep], JobRecord]


@pytest.fixture
def run(redis: Redis, store: JobStore, tmp_path: Path) -> Callable[..., JobRecord]:
    """Have a worker with the fake engine run a new job; return its record."""

    def run_job(
        on_step: Callable[[str, int], None], pace: PreviewPace | None = EVERY_STEP
    ) -> JobRecord:
        job = store.create(REQUEST, QUEUE).job
        engine = FakeEngine(lambda step: on_step(job.id, step), pace)
        worker = ResidentWorker(engine, redis, FolderArtifactStore(tmp_path / "artifacts"))
        worker.work(burst=True, logging_level="WARNING")
        return store.get(job.id)

    return run_job


def test_a_running_job_shows_brighter_and_brighter_previews(
    redis: Redis, run: Callable[..., JobRecord]
) -> None:
    seen: list[float] = []

    def on_step(job_id: str, step: int) -> None:
        if step == 1:
            assert read_preview(redis, job_id) is None
            return
        number = str(step - 1).encode()
        wait_for(lambda: redis.hget(redis_keys.record(job_id), "preview") == number)
        picture = read_preview(redis, job_id)
        assert picture is not None
        frames, _ = decoded(picture)
        assert frames.shape[1:] == (4, 8, 3)
        seen.append(frames.mean())

    job = run(on_step)
    assert job.state is JobState.SUCCEEDED
    assert seen == sorted(seen)
    assert [round(each / 64) for each in seen] == [1, 2, 3]
    assert job.preview is None
    assert read_preview(redis, job.id) is None
    entries = redis.xrange(*events.range_after(job.id, events.START))
    assert {event.preview for event in events.decode(entries) if event.kind == "preview"} >= {1, 2}


def test_a_cancelled_job_leaves_no_preview(
    redis: Redis, store: JobStore, run: Callable[..., JobRecord]
) -> None:
    def on_step(job_id: str, step: int) -> None:
        if step == 2:
            wait_for(lambda: read_preview(redis, job_id))
            store.cancel(job_id)
            time.sleep(0.5)  # the lease's thread finds the request

    job = run(on_step)
    assert job.state is JobState.CANCELLED
    assert read_preview(redis, job.id) is None
    with pytest.raises(StaleAttempt):
        PreviewWriter(redis).write(Attempt(job_id=job.id, number=1, token="x"), b"late")


def test_without_previews_a_job_has_none_and_no_thread_for_them(
    redis: Redis, run: Callable[..., JobRecord]
) -> None:
    names: set[str] = set()

    def on_step(job_id: str, step: int) -> None:
        names.update(thread.name for thread in threading.enumerate())
        assert read_preview(redis, job_id) is None

    job = run(on_step, None)
    assert job.state is JobState.SUCCEEDED
    assert "lease" in names
    assert "preview" not in names
    entries = redis.xrange(*events.range_after(job.id, events.START))
    assert "preview" not in {event.kind for event in events.decode(entries)}


def test_an_error_of_previews_is_no_failure_of_the_job(
    run: Callable[..., JobRecord],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> PreviewClip:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(FakeEngine, "_preview", fail)
    with caplog.at_level(logging.ERROR):
        assert run(lambda job_id, step: None).state is JobState.SUCCEEDED
    assert caplog.text.count("no more previews") == 1
