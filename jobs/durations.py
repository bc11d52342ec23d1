"""Keep how long jobs of one shape take, and derive how long an attempt may take.

A shape is what a job's time depends on, apart from its number of steps: model, mode, size, frames,
and whether guidance doubles the work. Kept in Redis for estimates: the seconds a running job has
left, and when a waiting one will start. A shape that was never run has none, and no estimate is
made up for it.

An attempt may take

    600 s + steps x (5 s + 4 ms x tokens)

or ten times what its shape was measured to take, whichever is longer. `tokens` is the length of the
transformer's sequence. For 832x480, 81 frames and 50 steps that is two hours; the slowest published
figure for the 14B model on one device (Ascend 910B, BF16) is 860 s. The limit only ends attempts
that would never end: a hung device is noticed much earlier, by the worker itself.
"""

import math
import time
from dataclasses import astuple, dataclass
from typing import Final, cast

from redis import Redis

from jobs import redis_keys
from jobs.spec import FRAME_STRIDE, GenerationRequest

WEIGHT_OF_LATEST = 0.3
"""A new measurement moves what is kept by this much: one odd job does not spoil the estimates."""

REMEMBERED_S: Final = 5.0
MOST_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of a job.

    Attributes:
        step_s: one denoising step.
        rest_s: everything else together, but encoding texts.
        texts_s: encoding them. Of some jobs a worker has them already, so this is between what jobs
            take that encode theirs, and nothing.
    """

    step_s: float
    rest_s: float
    texts_s: float = 0.0

    def job_s(self, steps: int) -> float:
        return self.texts_s + self.rest_s + steps * self.step_s


def shape(request: GenerationRequest) -> str:
    """Name the shape of a request: `model|mode|size|frames|guided`."""
    guided = int(request.guidance_scale > 1)
    return f"{request.model}|{request.mode}|{request.size}|{request.num_frames}|{guided}"


def read(redis: Redis, request: GenerationRequest) -> Durations | None:
    """The pace of the request's shape; None where none was measured."""
    found = redis.hget(redis_keys.PACE, shape(request))
    if found is None:
        return None
    try:
        return parse(cast("bytes", found))
    except ValueError:  # another version's: the next job of the shape is measured anew
        return None


def parse(text: bytes) -> Durations:
    """What Redis has of a shape; ValueError if that is no pace of this version."""
    step_s, rest_s, texts_s = map(float, text.split())
    return Durations(step_s, rest_s, texts_s)


def measure(redis: Redis, request: GenerationRequest, measured: Durations) -> Durations:
    """Add a measurement, and return what is now kept.

    Two workers that measure at the same moment may lose one of the two, which harms nothing.
    """
    kept = read(redis, request)
    if kept is not None:
        pairs = zip(astuple(kept), astuple(measured), strict=True)
        measured = Durations(*(old + WEIGHT_OF_LATEST * (new - old) for old, new in pairs))
    redis.hset(
        redis_keys.PACE, shape(request), " ".join(f"{each:.6f}" for each in astuple(measured))
    )
    return measured


class DurationCache:
    """Paces as they were some seconds ago, for who asks with every job that is created.

    Safe to share between threads.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._read: dict[str, tuple[float, Durations | None]] = {}

    def of(self, request: GenerationRequest) -> Durations | None:
        name = shape(request)
        now = time.monotonic()
        until, pace = self._read.get(name, (0.0, None))
        if now >= until:
            pace = read(self._redis, request)
            if len(self._read) >= MOST_REMEMBERED:
                self._read.clear()
            self._read[name] = (now + REMEMBERED_S, pace)
        return pace


BASE_S = 600
STEP_S = 5.0
TOKEN_S = 0.004
PATCH_PX = 16
"""One token covers 16x16 pixels: the VAE's stride of 8 times the transformer's patch of 2."""

SLACK = 10
"""At least this many times the measured duration."""


def timeout_s(request: GenerationRequest, pace: Durations | None = None) -> int:
    """Return the limit in whole seconds; `pace` is that of the request's shape, if measured."""
    frames = 1 + (request.num_frames - 1) // FRAME_STRIDE
    tokens = (request.width / PATCH_PX) * (request.height / PATCH_PX) * frames
    limit = BASE_S + request.num_inference_steps * (STEP_S + TOKEN_S * tokens)
    if pace is not None:
        limit = max(limit, SLACK * pace.job_s(request.num_inference_steps))
    return math.ceil(limit)
