"""How fast jobs of one shape run, as the workers have measured it.

A shape is what a job's time depends on, apart from its number of steps: model, mode, size, frames,
and whether guidance doubles the work. Kept in Redis for estimates: the seconds a running job has
left, and when a waiting one will start. A shape that was never run has none, and no estimate is
made up for it.
"""

import time
from dataclasses import dataclass
from typing import Final, cast

from redis import Redis

from jobs import keys
from jobs.spec import GenerationRequest

WEIGHT_OF_LATEST = 0.3
"""A new measurement moves what is kept by this much: one odd job does not spoil the estimates."""

REMEMBERED_S: Final = 5.0
MOST_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds for one denoising step, and for everything else of a job together."""

    step_s: float
    rest_s: float

    def job_s(self, steps: int) -> float:
        return self.rest_s + steps * self.step_s


def shape(request: GenerationRequest) -> str:
    """Name the shape of a request: `model|mode|size|frames|guided`."""
    guided = int(request.guidance_scale > 1)
    return f"{request.model}|{request.mode}|{request.size}|{request.num_frames}|{guided}"


def read(redis: Redis, request: GenerationRequest) -> Pace | None:
    """The pace of the request's shape; None where none was measured."""
    found = redis.hget(keys.PACE, shape(request))
    if found is None:
        return None
    try:
        step_s, rest_s = map(float, cast("bytes", found).split())
    except ValueError:  # another version's: the next job of the shape is measured anew
        return None
    return Pace(step_s, rest_s)


def measure(redis: Redis, request: GenerationRequest, measured: Pace) -> Pace:
    """Add a measurement, and return what is now kept.

    Two workers that measure at the same moment may lose one of the two, which harms nothing.
    """
    kept = read(redis, request)
    if kept is not None:
        measured = Pace(
            kept.step_s + WEIGHT_OF_LATEST * (measured.step_s - kept.step_s),
            kept.rest_s + WEIGHT_OF_LATEST * (measured.rest_s - kept.rest_s),
        )
    redis.hset(keys.PACE, shape(request), f"{measured.step_s:.6f} {measured.rest_s:.6f}")
    return measured


class Paces:
    """Paces as they were some seconds ago, for who asks with every job that is created.

    Safe to share between threads.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._read: dict[str, tuple[float, Pace | None]] = {}

    def of(self, request: GenerationRequest) -> Pace | None:
        name = shape(request)
        now = time.monotonic()
        until, pace = self._read.get(name, (0.0, None))
        if now >= until:
            pace = read(self._redis, request)
            if len(self._read) >= MOST_REMEMBERED:
                self._read.clear()
            self._read[name] = (now + REMEMBERED_S, pace)
        return pace
