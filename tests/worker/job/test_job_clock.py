"""What counts as a stalled step, and how many seconds a job has left."""

from collections.abc import Callable

import pytest

from jobs.durations import Durations
from jobs.record import Stage
from tests.support.requests import order
from worker.job.progress import FINISH_S, JobClock
from worker.process.stats import StepTimes
from worker.settings import StallLimits

ORDER = order(num_inference_steps=4)
LIMITS = StallLimits(floor_s=15, first_step_s=600)


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told to go on."""
    now = [1000.0]
    monkeypatch.setattr("worker.job.progress.time.monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def test_the_silence_allowed_follows_the_steps_of_the_kind(wait: Callable[[float], None]) -> None:
    times = StepTimes()
    clock = JobClock(ORDER, None, times, LIMITS)
    assert clock.silence_s() == FINISH_S  # before anything has begun
    clock.at(Stage.TEXT_ENCODER, 0, 1)
    assert clock.silence_s() == LIMITS.first_step_s
    wait(1)
    clock.at(Stage.DENOISE, 0, 4)
    assert clock.silence_s() == LIMITS.first_step_s
    wait(0.1)
    clock.at(Stage.DENOISE, 1, 4)
    assert clock.silence_s() == LIMITS.floor_s
    for step in (2, 3):
        wait(20)
        clock.at(Stage.DENOISE, step, 4)
    assert clock.silence_s() == pytest.approx(10 * 20)
    wait(20)
    clock.at(Stage.DENOISE, 4, 4)
    assert clock.silence_s() == FINISH_S
    clock.at(Stage.VAE, 0, 2)
    assert clock.silence_s() == LIMITS.first_step_s
    clock.at(Stage.MP4, 0, 1)
    assert clock.silence_s() == FINISH_S
    assert clock.own_steps == pytest.approx([0.1, 20, 20, 20])


def test_short_steps_of_a_cache_do_not_make_a_full_one_a_stall(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(order(num_inference_steps=50), None, StepTimes(), LIMITS)
    for step in range(41):
        clock.at(Stage.DENOISE, step, 50)
        wait(0.1 if step % 4 else 17)  # three of four steps are left out
    assert clock.silence_s() == pytest.approx(3 * 17)


def test_the_next_job_of_the_shape_knows_and_one_of_another_does_not(
    wait: Callable[[float], None],
) -> None:
    times = StepTimes()
    first = JobClock(ORDER, None, times, LIMITS)
    first.at(Stage.TEXT_ENCODER, 0, 1)
    wait(3)
    first.at(Stage.DENOISE, 0, 4)
    wait(5)
    first.at(Stage.DENOISE, 1, 4)
    second = JobClock(ORDER, None, times, LIMITS)
    second.at(Stage.TEXT_ENCODER, 0, 1)
    assert second.silence_s() == 30
    second.at(Stage.DENOISE, 0, 4)
    assert second.silence_s() == 50
    other = JobClock(order(num_frames=5), None, times, LIMITS)
    other.at(Stage.DENOISE, 0, 4)
    assert other.silence_s() == LIMITS.first_step_s


def test_with_a_pace_the_rest_is_known_from_the_start_and_follows_the_own_steps(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(ORDER, Durations(step_s=10, rest_s=4, texts_s=2), StepTimes(), LIMITS)
    clock.at(Stage.TEXT_ENCODER, 0, 1)
    assert clock.seconds_left() == 46
    wait(2)
    clock.at(Stage.DENOISE, 0, 4)
    assert clock.seconds_left() == 44
    wait(4)  # faster than measured: the estimate comes down with it
    clock.at(Stage.DENOISE, 1, 4)
    assert clock.seconds_left() == pytest.approx(4 + 3 * (2 * 10 + 4) / 3)
    for step in (2, 3, 4):
        wait(4)
        clock.at(Stage.DENOISE, step, 4)
    assert clock.seconds_left() == 4
    clock.at(Stage.VAE, 0, 2)
    wait(3)
    clock.at(Stage.VAE, 1, 2)
    assert clock.seconds_left() == 1
    wait(30)
    clock.at(Stage.MP4, 0, 1)
    assert clock.seconds_left() == 0


def test_a_job_that_encodes_nothing_and_one_that_does_know_it_of_themselves(
    wait: Callable[[float], None],
) -> None:
    times = StepTimes()
    between = Durations(step_s=10, rest_s=4, texts_s=30)  # of jobs that took 90 s for it, or none
    kept = JobClock(ORDER, between, times, LIMITS)
    kept.at(Stage.DENOISE, 0, 4)
    assert kept.seconds_left() == 44
    encoding = JobClock(ORDER, between, times, LIMITS)
    encoding.at(Stage.TEXT_ENCODER, 0, 1)
    assert encoding.seconds_left() == 74
    wait(50)
    assert encoding.seconds_left() == 44, "late with its texts, and no less to do afterwards"
    wait(40)
    encoding.at(Stage.DENOISE, 0, 4)
    assert encoding.seconds_left() == 44
    another = JobClock(ORDER, between, times, LIMITS)
    another.at(Stage.TEXT_ENCODER, 0, 1)
    assert another.seconds_left() == 134, "this worker has seen what it takes"


def test_without_a_pace_it_is_known_after_the_first_own_step(
    wait: Callable[[float], None],
) -> None:
    clock = JobClock(ORDER, None, StepTimes(), LIMITS)
    assert clock.seconds_left() is None
    clock.at(Stage.TEXT_ENCODER, 0, 1)
    wait(1)
    assert clock.seconds_left() is None
    clock.at(Stage.DENOISE, 0, 4)
    assert clock.seconds_left() is None
    wait(5)
    clock.at(Stage.DENOISE, 1, 4)
    assert clock.seconds_left() == 15
    for step in (2, 3, 4):
        wait(5)
        clock.at(Stage.DENOISE, step, 4)
    assert clock.seconds_left() == 0
    clock.at(Stage.VAE, 0, 2)
    assert clock.seconds_left() is None
    clock.at(Stage.MP4, 0, 1)
    assert clock.seconds_left() is None
