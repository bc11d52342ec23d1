"""Play a worker from within a test: it offers a model, and does with jobs what the test says.

So a test stops a job at any step and looks at the page. Videos are real files, made by ffmpeg.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import imageio_ffmpeg
from redis import Redis
from rq import Queue

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.artifacts.store import ArtifactStore, artifact_key, thumbnail_key
from jobs.catalog import ModeOffer, WorkerOffer
from jobs.record import Attempt, Failure, Picture, Progress, Stage, StageTimings, Video
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.pages.drawing_worker import DrawingEngine

WIDTH, HEIGHT, FRAMES, FPS = 96, 64, 17, 8
TIMINGS = StageTimings(
    queue_s=0.5, text_encoder_s=0.25, denoise_s=6, vae_s=1, mp4_s=0.25, total_s=7.5
)


def make_files(folder: Path) -> tuple[Path, Path]:
    """Make a video in which much moves, and a thumbnail."""
    video, picture = folder / "video.mp4", folder / "thumbnail.webp"
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate={FPS}"
    for arguments in (
        ["-frames:v", str(FRAMES), "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(video)],
        ["-frames:v", "1", str(picture)],
    ):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source]
        subprocess.run([*command, *arguments], check=True)
    return video, picture


class PlayedWorker:
    """A worker without a process; use it as a context manager, which keeps its offer live."""

    def __init__(
        self,
        redis: Redis,
        artifacts: ArtifactStore,
        files: tuple[Path, Path],
        modes: tuple[ModeOffer, ...] = DrawingEngine.modes,
    ) -> None:
        self.store = JobStore(redis)
        self._redis = redis
        self._artifacts = artifacts
        self._files = files
        self._attempts: dict[str, Attempt] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._stay_live)
        self.offer = self._offer(modes)

    def __enter__(self) -> PlayedWorker:
        catalog.publish(self._redis, self.offer)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def take(self, mode: str | None = None) -> str:
        """Wait for a job, begin the oldest that waits, and return its id."""

        def waiting() -> list[str]:
            jobs = self.store.list(JobState.QUEUED, oldest_first=True).jobs
            return [job.id for job in jobs if mode in (None, job.request.mode)]

        wait_until(lambda: bool(waiting()), 30, "a job waits", every_s=0.05)
        job_id = waiting()[0]
        self._redis.lrem(Queue(self.offer.queue, connection=self._redis).key, 0, job_id)
        self._attempts[job_id] = self.store.claim(job_id, self.offer.worker_id)
        return job_id

    def step(self, job_id: str, step: int, steps: int = 8, seconds_left: float = 30) -> None:
        progress = Progress(stage=Stage.DENOISE, step=step, steps=steps, seconds_left=seconds_left)
        self.store.progress(self._attempts[job_id], progress)

    def succeed(self, job_id: str) -> None:
        video = self._put(artifact_key(job_id, "1"), self._files[0])
        picture = self._put(thumbnail_key(job_id, "1"), self._files[1])
        size = {"width": WIDTH, "height": HEIGHT}
        made = Video(
            **video, **size, num_frames=FRAMES, fps=FPS, thumbnail=Picture(**picture, **size)
        )
        self.store.succeed(self._attempts[job_id], made, TIMINGS)

    def fail(self, job_id: str, code: str, detail: str) -> None:
        self.store.fail(self._attempts[job_id], Failure(code=code, detail=detail))

    def is_asked_to_stop(self, job_id: str) -> bool:
        return self.store.cancel_requested(self._attempts[job_id])

    def stop(self, job_id: str) -> None:
        self.store.cancelled(self._attempts[job_id])

    def _put(self, key: str, file: Path) -> dict[str, object]:
        copy = file.with_suffix(".stored")  # what is put is moved
        copy.write_bytes(data := file.read_bytes())
        self._artifacts.put(key, copy)
        return {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _offer(self, modes: tuple[ModeOffer, ...]) -> WorkerOffer:
        model = DrawingEngine.model
        queue = catalog.queue_name(model, modes)
        now = datetime.now(UTC)
        return WorkerOffer(
            worker_id="played", queue=queue, device="cpu", model=model, modes=modes, started_at=now
        )

    def _stay_live(self) -> None:
        while not self._end.wait(2):
            catalog.publish(self._redis, self.offer)
            for attempt in list(self._attempts.values()):
                if self.store.get(attempt.job_id).state is JobState.RUNNING:
                    self.store.renew(attempt)
