"""Read how many jobs ended in the last hours, how long they waited, and how long they ran.

The scripts keep the numbers by the minute (`jobs/store/counters.py`). Here they are summed over
longer steps, so that an answer has a few hundred points however long it looks back.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis import Redis

from jobs import redis_keys
from jobs.redis_client import server_time_s

LONGEST_H: Final = redis_keys.SERIES_TTL_S // 3600
_STEPS: Final = {6: 1, 24: 5, LONGEST_H: 30}
"""Minutes of one step, by the most hours that are looked back."""

ENDED: Final = ("succeeded", "failed", "cancelled")

Sums = Mapping[str, Mapping[int, float]]
"""By what was summed (`succeeded`, `wait_s`, ...): the sum of each step."""


@dataclass(frozen=True, slots=True)
class ModeSeries:
    """The series of one mode, with a value for each step.

    Attributes:
        ended: by final state, how many jobs ended in a step.
        wait_s: how long the jobs that started in a step had waited, on average; None if none did.
        run_s: how long those that succeeded in a step had run, on average; None if none did.
    """

    mode: str
    ended: Mapping[str, Sequence[int]]
    wait_s: Sequence[float | None]
    run_s: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """The series of all modes; `starts_s` are the Unix seconds at which the steps start."""

    step_s: int
    starts_s: Sequence[int]
    modes: Sequence[ModeSeries]


def read_series(redis: Redis, hours: int) -> Series:
    """Read the series of so many hours until now, 1 to 168; the last step is under way."""
    minutes = next(step for most, step in _STEPS.items() if hours <= most)
    now_minute = int(server_time_s(redis)) // 60
    last = now_minute // minutes
    steps = range(last - hours * 60 // minutes + 1, last + 1)
    sums: dict[str, dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(float))
    )
    for minute, mode, what, value in _values(redis, steps[0] * minutes // 60, now_minute // 60):
        sums[mode][what][minute // minutes] += value
    return Series(
        step_s=minutes * 60,
        starts_s=[step * minutes * 60 for step in steps],
        modes=[_of_mode(mode, sums[mode], steps) for mode in sorted(sums)],
    )


def _values(redis: Redis, first: int, last: int) -> Iterator[tuple[int, str, str, float]]:
    hours = range(first, last + 1)
    with redis.pipeline(transaction=False) as pipe:
        for hour in hours:
            pipe.hgetall(redis_keys.series(hour))
        found = pipe.execute()
    for hour, fields in zip(hours, found, strict=True):
        for field, value in fields.items():
            minute, mode, what = field.decode().split("|")
            yield hour * 60 + int(minute), mode, what, float(value)


def _of_mode(mode: str, sums: Sums, steps: Sequence[int]) -> ModeSeries:
    def of(what: str) -> list[float]:
        values = sums.get(what, {})
        return [values.get(step, 0.0) for step in steps]

    def mean(what: str) -> list[float | None]:
        pairs = zip(of(f"{what}_s"), of(what), strict=True)
        return [round(sum_s / number, 3) if number else None for sum_s, number in pairs]

    return ModeSeries(
        mode=mode,
        ended={state: [int(value) for value in of(state)] for state in ENDED},
        wait_s=mean("wait"),
        run_s=mean("service"),
    )
