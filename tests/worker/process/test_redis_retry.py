"""Test which Redis errors are retried, and for how long."""

import time
from collections.abc import Callable

import pytest
from redis.exceptions import (
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.process.redis_retry import RedisOutage, retry_until_answered


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
