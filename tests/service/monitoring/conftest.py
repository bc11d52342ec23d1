"""A history of jobs, for tests of what is shown of it."""

import pytest
from redis import Redis

from jobs import durations
from jobs.catalog import WorkerOffer
from jobs.durations import Durations
from jobs.record import Failure, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from jobs.store.workers import ModeStatus, WorkerStatus, publish_status

TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


def a_video(attempt_key: str) -> Video:
    return Video(key=attempt_key, bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8)


@pytest.fixture
def history(
    store: JobStore,
    redis: Redis,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    """Five jobs: succeeded, failed after a lost attempt, cancelled, and two queued."""
    queue = live_worker.queue

    def taken() -> str:
        job = store.create(request_for_video, queue).job
        redis.lrem(f"rq:queue:{queue}", 1, job.id)
        return job.id

    store.succeed(store.claim(taken(), "w"), a_video("videos/a/1.mp4"), TIMINGS)
    unlucky = taken()
    store.give_up(store.claim(unlucky, "w"))
    redis.lrem(f"rq:queue:{queue}", 1, unlucky)
    store.fail(store.claim(unlucky, "w"), Failure(code="out_of_device_memory", detail="Full."))
    store.cancel(store.create(request_for_video, queue).job.id)
    webhook = Submission(webhook_url="https://example.com/hook")
    store.cancel(store.create(request_for_video, queue, webhook).job.id)
    for _ in range(2):
        store.create(request_for_video, queue)
    durations.measure(
        redis, request_for_video, Durations(step_s=0.25, rest_s=1.0, text_encoding_s=0.5)
    )
    publish_status(
        redis,
        WorkerStatus(
            worker_id=live_worker.worker_id,
            state="busy",
            job_id=unlucky,
            jobs_done=7,
            memory_allocated_bytes=30 << 30,
            memory_peak_bytes=40 << 30,
            memory_total_bytes=64 << 30,
            modes={"w8a8": ModeStatus(step_s=0.2, saturated_share=0.001, flushed_share=0.02)},
        ),
    )
