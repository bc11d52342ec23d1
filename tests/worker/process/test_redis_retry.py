"""What is asked of Redis again, and for how long."""

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

from worker.process.redis_retry import RedisOutage, keep_asking


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
def test_what_may_pass_is_asked_again(error: RedisError) -> None:
    call, calls = failing_once(error)
    assert keep_asking(call, RedisOutage()) == "answer"
    assert len(calls) == 2


def test_what_would_come_again_is_raised_at_once() -> None:
    call, calls = failing_once(ResponseError("WRONGTYPE Operation against a key"))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        keep_asking(call, RedisOutage())
    assert len(calls) == 1


def test_who_is_hurried_gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.process.redis_retry.HURRIED_S", 0.2)

    def gone() -> None:
        raise RedisConnectionError("gone")

    began = time.monotonic()
    with pytest.raises(RedisConnectionError):
        keep_asking(gone, RedisOutage(), hurried=lambda: time.monotonic() - began > 0.3)
    assert 0.5 <= time.monotonic() - began < 30
