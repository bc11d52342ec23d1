"""Test when a step counts as hanging, and how many seconds a job has left."""

from collections.abc import Callable

import pytest

from jobs.durations import Durations
from jobs.record import Stage
from tests.support.requests import generation_request
from worker.job.progress import FINISH_S, JobClock
from worker.process.stats import StepTimes
from worker.settings import StallLimits

REQUEST = generation_request(num_inference_steps=4)
LIMITS = StallLimits(floor_s=15, first_step_s=600)


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replace the clock by one that only advances when this is called."""
    now = [1000.0]
    monkeypatch.setattr("worker.job.progress.time.monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_silence_allowed_follows_the_steps_of_the_kind(wait: Callable[[float], None]) -> None:
    times = StepTimes()
    clock = JobClock(REQUEST, None, times, LIMITS)
    assert clock.allowed_silence_s() == FINISH_S  # before anything has begun
    clock.update(Stage.TEXT_ENCODER, 0, 1)
    assert clock.allowed_silence_s() == LIMITS.first_step_s
    wait(1)
    clock.update(Stage.DENOISE, 0, 4)
    assert clock.allowed_silence_s() == LIMITS.first_step_s
    wait(0.1)
    clock.update(Stage.DENOISE, 1, 4)
    assert clock.allowed_silence_s() == LIMITS.floor_s
    for step in (2, 3):
        wait(20)
        clock.update(Stage.DENOISE, step, 4)
    assert clock.allowed_silence_s() == pytest.approx(10 * 20)
    wait(20)
    clock.update(Stage.DENOISE, 4, 4)
    assert clock.allowed_silence_s() == FINISH_S
    clock.update(Stage.VAE, 0, 2)
    assert clock.allowed_silence_s() == LIMITS.first_step_s
    clock.update(Stage.MP4, 0, 1)
    assert clock.allowed_silence_s() == FINISH_S
    assert clock.step_seconds == pytest.approx([0.1, 20, 20, 20])


def test_a_full_step_among_short_ones_of_a_cache_is_no_stall(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(generation_request(num_inference_steps=50), None, StepTimes(), LIMITS)
    for step in range(41):
        clock.update(Stage.DENOISE, step, 50)
        wait(0.1 if step % 4 else 17)  # three of four steps are skipped
    assert clock.allowed_silence_s() == pytest.approx(3 * 17)


def test_the_next_job_of_the_same_shape_uses_the_measured_steps(
    wait: Callable[[float], None],
) -> None:
    times = StepTimes()
    first = JobClock(REQUEST, None, times, LIMITS)
    first.update(Stage.TEXT_ENCODER, 0, 1)
    wait(3)
    first.update(Stage.DENOISE, 0, 4)
    wait(5)
    first.update(Stage.DENOISE, 1, 4)
    second = JobClock(REQUEST, None, times, LIMITS)
    second.update(Stage.TEXT_ENCODER, 0, 1)
    assert second.allowed_silence_s() == 30
    second.update(Stage.DENOISE, 0, 4)
    assert second.allowed_silence_s() == 50
    other = JobClock(generation_request(num_frames=5), None, times, LIMITS)
    other.update(Stage.DENOISE, 0, 4)
    assert other.allowed_silence_s() == LIMITS.first_step_s


def test_with_measured_durations_the_estimate_starts_at_once_and_follows_the_own_steps(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(
        REQUEST, Durations(step_s=10, rest_s=4, text_encoding_s=2), StepTimes(), LIMITS
    )
    clock.update(Stage.TEXT_ENCODER, 0, 1)
    assert clock.seconds_left() == 46
    wait(2)
    clock.update(Stage.DENOISE, 0, 4)
    assert clock.seconds_left() == 44
    wait(4)  # faster than measured: the estimate comes down with it
    clock.update(Stage.DENOISE, 1, 4)
    assert clock.seconds_left() == pytest.approx(4 + 3 * (2 * 10 + 4) / 3)
    for step in (2, 3, 4):
        wait(4)
        clock.update(Stage.DENOISE, step, 4)
    assert clock.seconds_left() == 4
    clock.update(Stage.VAE, 0, 2)
    wait(3)
    clock.update(Stage.VAE, 1, 2)
    assert clock.seconds_left() == 1
    wait(30)
    clock.update(Stage.MP4, 0, 1)
    assert clock.seconds_left() == 0


def test_the_estimate_depends_on_whether_a_job_encodes_texts(
    wait: Callable[[float], None],
) -> None:
    times = StepTimes()
    # The average of jobs that encode for 90 s or not at all.
    between = Durations(step_s=10, rest_s=4, text_encoding_s=30)
    cached = JobClock(REQUEST, between, times, LIMITS)
    cached.update(Stage.DENOISE, 0, 4)
    assert cached.seconds_left() == 44
    encoding = JobClock(REQUEST, between, times, LIMITS)
    encoding.update(Stage.TEXT_ENCODER, 0, 1)
    assert encoding.seconds_left() == 74
    wait(50)
    assert encoding.seconds_left() == 44, "late with its texts, and the remaining work is the same"
    wait(40)
    encoding.update(Stage.DENOISE, 0, 4)
    assert encoding.seconds_left() == 44
    another = JobClock(REQUEST, between, times, LIMITS)
    another.update(Stage.TEXT_ENCODER, 0, 1)
    assert another.seconds_left() == 134, "this worker has measured it"


def test_without_measured_durations_the_estimate_starts_after_the_first_own_step(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(REQUEST, None, StepTimes(), LIMITS)
    assert clock.seconds_left() is None
    clock.update(Stage.TEXT_ENCODER, 0, 1)
    wait(1)
    assert clock.seconds_left() is None
    clock.update(Stage.DENOISE, 0, 4)
    assert clock.seconds_left() is None
    wait(5)
    clock.update(Stage.DENOISE, 1, 4)
    assert clock.seconds_left() == 15
    for step in (2, 3, 4):
        wait(5)
        clock.update(Stage.DENOISE, step, 4)
    assert clock.seconds_left() == 0
    clock.update(Stage.VAE, 0, 2)
    assert clock.seconds_left() is None
    clock.update(Stage.MP4, 0, 1)
    assert clock.seconds_left() is None


@pytest.mark.parametrize(("steps", "expected"), [(0, None), (1, 1), (9, 9), (10, 9), (20, 18)])
def test_one_step_in_ten_takes_longer_than_the_90th_percentile(
    steps: int, expected: float | None
) -> None:
    times = StepTimes()
    for seconds in range(steps, 0, -1):
        times.add("shape", Stage.DENOISE, seconds)
    assert times.percentile_90("shape", Stage.DENOISE) == expected
