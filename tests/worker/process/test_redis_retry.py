"""Test which Redis errors are retried, and for how long."""

import time
from collections.abc import Callable

import pytest
from redis.exceptions import (
    BusyLoadingError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.process.redis_retry import Backoff, RedisOutage, retry_until_answered


def failing_once(error: RedisError) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return "answer"

    return call, calls


@pytest.mark.parametrize(
    "error",
    [
        RedisConnectionError("gone"),
        RedisTimeoutError("slow"),
        BusyLoadingError("loading"),
        ReadOnlyError("a replica"),
        OutOfMemoryError("full"),
        MasterDownError("Link with MASTER is down"),
        TryAgainError("Multiple keys request during rehashing of slot"),
        NoScriptError("No matching script."),
        ResponseError("MISCONF Valkey is configured to save RDB snapshots"),
    ],
)
def test_a_transient_error_is_retried(error: RedisError) -> None:
    call, calls = failing_once(error)
    assert retry_until_answered(call, RedisOutage()) == "answer"
    assert len(calls) == 2


def test_a_lasting_error_is_raised_at_once() -> None:
    call, calls = failing_once(ResponseError("WRONGTYPE Operation against a key"))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        retry_until_answered(call, RedisOutage())
    assert len(calls) == 1


class Clock:
    """A clock that only sleeping moves; it notes each pause."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds


def test_a_command_is_repeated_for_ten_minutes_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("worker.process.redis_retry.time", clock)

    def unreachable() -> None:
        raise MasterDownError("Link with MASTER is down")

    with pytest.raises(MasterDownError):
        retry_until_answered(unreachable, RedisOutage())
    assert 600 < clock.now_s <= 602, "no try starts later than a pause after ten minutes"
    for number, pause_s in enumerate(clock.pauses_s, start=1):
        longest_s = min(2.0, 0.05 * 2**number)
        assert longest_s / 2 <= pause_s <= longest_s, number


def test_pauses_are_short_again_after_a_reset() -> None:
    backoff = Backoff()
    assert max(backoff.next_s() for _ in range(10)) >= 1
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_shutting_down_shortens_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.process.redis_retry.SHUTDOWN_TIMEOUT_S", 0.2)

    def unreachable() -> None:
        raise RedisConnectionError("gone")

    started = time.monotonic()
    with pytest.raises(RedisConnectionError):
        retry_until_answered(
            unreachable, RedisOutage(), shutting_down=lambda: time.monotonic() - started > 0.3
        )
    assert 0.5 <= time.monotonic() - started < 30
