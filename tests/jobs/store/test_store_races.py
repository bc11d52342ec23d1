"""Test concurrent calls for one job: it ends exactly once, and the end never changes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from redis import Redis

from jobs.errors import AppError
from jobs.record import Attempt, Failure, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore

CALLERS = 8
ROUNDS = 12
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


def race(calls: list[Callable[[], object]]) -> list[object]:
    """Run all calls at once; return each one's result or AppError."""
    start = Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        start.wait()
        try:
            return call()
        except AppError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def video(attempt: Attempt) -> Video:
    return Video(
        key=f"videos/{attempt.job_id}/{attempt.number}.mp4",
        bytes=1,
        sha256="00",
        width=96,
        height=96,
        num_frames=17,
        fps=8,
    )


def test_one_attempt_ends_exactly_one_way(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    for _ in range(ROUNDS):
        job = store.create(request_for_video, "q").job
        attempt = store.claim(job.id, "w")
        failure = Failure(code="generation_failed", detail="no")
        results = race(
            [
                lambda a=attempt: store.succeed(a, video(a), TIMINGS),  # type: ignore[misc]
                lambda a=attempt, f=failure: store.fail(a, f),  # type: ignore[misc]
                lambda a=attempt: store.cancelled(a),  # type: ignore[misc]
            ]
        )
        assert results.count(None) == 1
        ended = store.get(job.id)
        states = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]
        assert ended.state is states[results.index(None)]
        assert (ended.video is not None) == (ended.state is JobState.SUCCEEDED)
        assert (ended.failure is not None) == (ended.state is JobState.FAILED)


def test_cancel_against_claim(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    seen = set()
    for _ in range(ROUNDS):
        job = store.create(request_for_video, "q").job
        claimed, _ = race([lambda j=job.id: store.claim(j, "w"), lambda j=job.id: store.cancel(j)])  # type: ignore[misc]
        after = store.get(job.id)
        seen.add(after.state)
        if isinstance(claimed, Attempt):
            assert (after.state, after.cancel_requested) == (JobState.RUNNING, True)
            assert store.cancel_requested(claimed) is True
        else:
            assert after.state is JobState.CANCELLED
    assert seen <= {JobState.RUNNING, JobState.CANCELLED}


def test_workers_and_callers_at_once(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    """Workers claim and finish, callers cancel: there is one end and at most one video."""
    for _ in range(ROUNDS):
        job = store.create(request_for_video, "q").job

        def work(job_id: str = job.id) -> Attempt:
            attempt = store.claim(job_id, "w")
            store.succeed(attempt, video(attempt), TIMINGS)
            return attempt

        calls: list[Callable[[], object]] = [work] * CALLERS
        calls += [lambda j=job.id: store.cancel(j)] * CALLERS  # type: ignore[misc]
        results = race(calls)
        winners = [result for result in results if isinstance(result, Attempt)]
        ended = store.get(job.id)
        assert ended.state.is_terminal
        assert len(winners) == (1 if ended.state is JobState.SUCCEEDED else 0)
        if winners:
            assert ended.video == video(winners[0])
        listed = [s for s in JobState for each in store.list(state=s).jobs if each.id == job.id]
        assert listed == [ended.state]
