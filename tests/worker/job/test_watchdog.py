"""Test that a job without a sign of life ends its process, and no other job does."""

import threading
import time

import pytest

from worker.errors import EXIT_HUNG
from worker.job.watchdog import Watchdog


class FakeExit:
    """A callback in place of `os._exit`."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.called = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.called.set()


def test_silence_ends_the_process_after_the_callback() -> None:
    fake_exit, calls = FakeExit(), list[str]()
    with Watchdog(0.6, lambda: calls.append("given up"), fake_exit):
        assert fake_exit.called.wait(10)
    assert fake_exit.status == EXIT_HUNG
    assert calls == ["given up"]


def test_a_callback_that_hangs_is_not_waited_for_long(monkeypatch) -> None:
    monkeypatch.setattr("worker.job.watchdog.ON_HANG_TIMEOUT_S", 0.2)
    fake_exit, never = FakeExit(), threading.Event()
    with Watchdog(0.1, lambda: never.wait(30), fake_exit):
        assert fake_exit.called.wait(10)
    never.set()


def test_signs_of_life_and_a_larger_limit_prevent_the_end() -> None:
    fake_exit = FakeExit()
    with Watchdog(1.2, lambda: None, fake_exit) as watchdog:
        for _ in range(12):
            time.sleep(0.2)
            watchdog.alive()
        watchdog.set_limit(60)
        time.sleep(2)
    assert fake_exit.status is None


def test_a_process_that_was_stopped_and_goes_on_is_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock jumps by 1,000 s at a tick: only the job's own silence counts."""
    monkeypatch.setattr("worker.job.watchdog.TICK_S", 0.01)
    fake_exit, calls = FakeExit(), list[float]()
    several_ticks = threading.Event()

    def clock() -> float:
        calls.append(1000.0 * len(calls))
        if len(calls) == 5:
            several_ticks.set()
        return calls[-1]

    with Watchdog(60, lambda: None, fake_exit, clock):
        assert several_ticks.wait(10)
    assert fake_exit.status is None


def test_time_without_a_stop_counts_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.job.watchdog.TICK_S", 0.01)
    fake_exit, calls = FakeExit(), list[float]()

    def clock() -> float:
        calls.append(0.01 * len(calls))
        return calls[-1]

    with Watchdog(0.095, lambda: None, fake_exit, clock):
        assert fake_exit.called.wait(10)
    assert len(calls) == 11  # the start, and ten ticks
