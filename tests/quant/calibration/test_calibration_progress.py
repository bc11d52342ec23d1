"""Test what a calibration says: how long it will take, and where it is."""

from collections.abc import Iterator

import pytest

from quant.calibration.progress import CalibrationProgress


def clock() -> Iterator[float]:
    """Return the times of the ends of steps: 50 s for the first, 10 s for each other."""
    yield from (50 + 10 * step for step in range(1000))


def show(prompts: int, steps: int, first: int = 0) -> None:
    times = clock()
    progress = CalibrationProgress(prompts, clock=lambda: next(times))
    for done in range(first, prompts * steps + 1):
        progress(done, prompts * steps)
    progress.close()


def test_the_time_is_said_once_after_the_second_step(capsys: pytest.CaptureFixture[str]) -> None:
    show(prompts=8, steps=50)
    lines = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert len(lines) == 1
    assert "about 1:06:20 (h:mm:ss) for 398 steps, until 2" in lines[0]  # 398 of 10 s


def test_a_bar_says_prompt_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    show(prompts=8, steps=50)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "prompt 8 of 8: 100%" in last
    assert "400/400" in last


def test_it_says_where_it_goes_on_and_counts_only_what_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(prompts=8, steps=50, first=350)
    shown = capsys.readouterr().err
    assert "going on after prompt 7 of 8" in shown
    assert "about 0:08:00 (h:mm:ss) for 48 steps" in shown


@pytest.mark.parametrize("left", [0, 1, 2])
def test_the_last_steps_need_no_estimate(capsys: pytest.CaptureFixture[str], left: int) -> None:
    show(prompts=8, steps=1, first=8 - left)
    shown = capsys.readouterr().err
    assert "prompt 8 of 8" in shown
