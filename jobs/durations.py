"""Store measured durations by shape, and compute the time limit of an attempt.

A shape is what a job's time depends on, apart from its number of steps: model, mode, size, frames,
and whether guidance doubles the work. The durations of each shape are kept in Redis. They serve two
estimates: the seconds a running job has left, and when a waiting job will start. A shape that was
never run has no durations, and no estimate is made up for it.

An attempt may take

    600 s + steps x (5 s + 4 ms x tokens)

or ten times what its shape was measured to take, whichever is longer. `tokens` is the length of the
transformer's sequence. For 832x480, 81 frames and 50 steps that is two hours. The limit only ends
attempts that would never end: the worker itself notices a hung device much earlier.
"""

import math
import time
from dataclasses import astuple, dataclass
from typing import Final, cast

from redis import Redis

from jobs import redis_keys
from jobs.geometry import sequence_tokens
from jobs.spec import GenerationRequest

WEIGHT_OF_LATEST: Final = 0.3
"""The weight of a new measurement in the average, so one odd job does not spoil the estimates."""

CACHE_S: Final = 5.0
"""How long `DurationCache` keeps what it has read."""

MAX_CACHED: Final = 1024
"""The most shapes that `DurationCache` keeps."""

BASE_S: Final = 600
STEP_S: Final = 5.0
TOKEN_S: Final = 0.004

SLACK: Final = 10
"""An attempt may take at least this many times the measured duration."""


@dataclass(frozen=True, slots=True)
class Durations:
    """The seconds that the parts of a job of one shape take.

    Attributes:
        step_s: one denoising step.
        rest_s: everything else together, except encoding the texts.
        text_encoding_s: encoding the texts. Jobs whose embeddings are cached in the worker skip
            encoding, so this average lies between 0 and what encoding takes.
    """

    step_s: float
    rest_s: float
    text_encoding_s: float = 0.0

    def job_s(self, steps: int) -> float:
        """Return the seconds of a whole job of `steps` steps."""
        return self.text_encoding_s + self.rest_s + steps * self.step_s


class DurationCache:
    """Reads durations from Redis and keeps each for `CACHE_S`, as every new job needs them.

    Safe to share between threads.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._cached: dict[str, tuple[float, Durations | None]] = {}

    def of(self, request: GenerationRequest) -> Durations | None:
        """Return the durations of the request's shape; None where none were measured."""
        name = shape(request)
        now = time.monotonic()
        expires, durations = self._cached.get(name, (0.0, None))
        if now >= expires:
            durations = read(self._redis, request)
            if len(self._cached) >= MAX_CACHED:
                self._cached.clear()
            self._cached[name] = (now + CACHE_S, durations)
        return durations


def shape(request: GenerationRequest) -> str:
    """Name the shape of a request: `model|mode|size|frames|guided`."""
    guided = int(request.guidance_scale > 1)
    return f"{request.model}|{request.mode}|{request.size}|{request.num_frames}|{guided}"


def read(redis: Redis, request: GenerationRequest) -> Durations | None:
    """Read the durations of the request's shape; None where none were measured."""
    found = redis.hget(redis_keys.DURATIONS, shape(request))
    if found is None:
        return None
    try:
        return parse(cast("bytes", found))
    except ValueError:  # written by another version: the next job of the shape replaces it
        return None


def parse(text: bytes) -> Durations:
    """Parse what Redis holds for a shape: three numbers, separated by spaces.

    Another version may have added more, which are ignored.

    Raises:
        ValueError: the text was not written by this version.
    """
    step_s, rest_s, text_encoding_s = map(float, text.split()[:3])
    return Durations(step_s, rest_s, text_encoding_s)


def measure(redis: Redis, request: GenerationRequest, measured: Durations) -> Durations:
    """Update the moving average of the request's shape with a measurement, and return it.

    Of two workers that measure at the same moment, one may overwrite the other's measurement. That
    is harmless.
    """
    kept = read(redis, request)
    if kept is not None:
        pairs = zip(astuple(kept), astuple(measured), strict=True)
        measured = Durations(*(old + WEIGHT_OF_LATEST * (new - old) for old, new in pairs))
    redis.hset(
        redis_keys.DURATIONS, shape(request), " ".join(f"{each:.6f}" for each in astuple(measured))
    )
    return measured


def timeout_s(request: GenerationRequest, durations: Durations | None = None) -> int:
    """Return how long an attempt may take, in whole seconds.

    Args:
        durations: those of the request's shape; None if they were never measured.
    """
    tokens = sequence_tokens(request.width, request.height, request.num_frames)
    limit = BASE_S + request.num_inference_steps * (STEP_S + TOKEN_S * tokens)
    if durations is not None:
        limit = max(limit, SLACK * durations.job_s(request.num_inference_steps))
    return math.ceil(limit)
