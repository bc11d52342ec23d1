"""Tell retention the time, or refuse to if the clocks cannot be believed.

A clock that is days ahead makes every video look old, and what was deleted does not come back. So
the time is Redis' own, which also stamps the ends of jobs. No time is told while this host's clock
and Redis' are far apart, nor for a while after Redis' clock has moved much further than it was
looked at: operators then have the time to notice.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from redis import Redis

from jobs import record, redis_keys

APART: Final = timedelta(minutes=5)
"""Clocks that differ by more are not believed; hosts with NTP differ by milliseconds."""

JUMP: Final = timedelta(hours=1)
"""Every service process looks every few minutes. If more time seems to have passed between two
looks, the clock has jumped, or no process was running; the two cannot be told apart."""

LONGEST_HOLD: Final = timedelta(days=1)
"""After a jump no time is told for as long as the jump was, and for this long at most."""


class ClockRefused(Exception):
    """The time cannot be believed; the message says why, and what to do."""


class RetentionClock:
    """Tells the time of Redis. `host_now` is the clock of this host, for comparison."""

    def __init__(self, redis: Redis, host_now: Callable[[], datetime] = record.now) -> None:
        self._redis = redis
        self._host_now = host_now

    def now(self) -> datetime:
        """Return Redis' time.

        Raises:
            ClockRefused: this host's clock and Redis' differ by more than `APART`.
        """
        second, microsecond = self._redis.time()
        now = datetime.fromtimestamp(second, UTC) + timedelta(microseconds=microsecond)
        apart = self._host_now() - now
        if abs(apart) > APART:
            raise ClockRefused(
                f"this host's clock and Redis' differ by {_rounded(abs(apart))}, and "
                f"{_rounded(APART)} is the most; set the one that is wrong (NTP)"
            )
        return now

    def steady_now(self) -> datetime:
        """Return Redis' time, and note that it was looked at.

        Raises:
            ClockRefused: as `now`; or the clock has jumped ahead not long ago.
        """
        now = self.now()
        looked, held = self._redis.hmget(redis_keys.RETENTION_CLOCK, ["looked_ms", "held_ms"])
        passed = timedelta() if looked is None else now - _moment(looked)
        held_until = None if held is None else _moment(held)
        if passed > JUMP:
            held_until = now + min(passed, LONGEST_HOLD)
        elif passed < -JUMP:
            held_until = None  # the clock was set back, so nothing looks older than it is
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(redis_keys.RETENTION_CLOCK)
            pipe.hset(redis_keys.RETENTION_CLOCK, "looked_ms", _ms(now))
            if held_until is not None and now < held_until:
                pipe.hset(redis_keys.RETENTION_CLOCK, "held_ms", _ms(held_until))
            pipe.execute()
        if held_until is not None and now < held_until:
            raise ClockRefused(
                f"Redis' clock has jumped ahead, or no service was running for a while; check the "
                f"clock: nothing is deleted before {held_until:%Y-%m-%d %H:%M} UTC. "
                f"`python -m service retention` deletes now"
            )
        return now


def _moment(ms: bytes | str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _rounded(span: timedelta) -> timedelta:
    return timedelta(seconds=round(span.total_seconds()))
