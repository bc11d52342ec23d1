"""Say what arrives: rates of kinds of jobs, or recorded jobs, and how long each kind takes a card.

`MEASURED` has the seconds of Wan2.1-T2V-14B that docs/performance.md has, on one H200.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.serving.capacity.queue_model import Arrival

FRAMES: Final = 81
DEFAULT_STEPS: Final = 50
PASSES: Final = 2
"""With guidance a step is two passes."""

PASS_S: Final = {
    ("bf16", "832x480"): 2.333,
    ("w8a8", "832x480"): 1.922,
    ("w8a8-fp8", "832x480"): 1.667,
    ("bf16", "1280x720"): 9.176,
    ("w8a8", "1280x720"): 8.242,
    ("w8a8-fp8", "1280x720"): 6.705,
}
"""Seconds of one forward pass with 81 frames, measured ("One forward pass"); `w8a8-fp8` is `w8a8`
with FP8 attention."""

REST_S: Final = 0.05 + 1.71 + 1.88 + 0.31
REST_PIXELS: Final = 832 * 480 * 49
"""What a job takes besides denoising, measured with 49 frames ("Whole jobs"). Other sizes are
estimated: VAE, MP4 and pictures grow with the number of pixels."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Jobs that arrive at `per_hour` and take a card for `seconds` each."""

    name: str
    per_hour: float
    seconds: float
    priority: bool = False


def job_s(mode: str, size: str, steps: int = DEFAULT_STEPS) -> float:
    """Return the seconds of a job with guidance and 81 frames.

    Raises:
        ValueError: the shape was not measured.
    """
    if (mode, size) not in PASS_S:
        known = ", ".join(":".join(each) for each in PASS_S)
        raise ValueError(f"{mode}:{size} was not measured; give seconds, or one of {known}")
    width, height = map(int, size.split("x"))
    rest_s = REST_S * width * height * FRAMES / REST_PIXELS
    return steps * PASSES * PASS_S[mode, size] + rest_s


def parse_kind(text: str) -> Kind:
    """Read `RATE:SECONDS` or `RATE:MODE:SIZE[:STEPS]`, either with `:priority` at its end.

    RATE is jobs an hour, of all callers together.

    Raises:
        ValueError: it is neither, or a number is not above 0.
    """
    rate, *rest = text.split(":")
    priority = rest[-1:] == ["priority"]
    rest = rest[:-1] if priority else rest
    try:
        per_hour = float(rate)
        if len(rest) == 1:
            seconds = float(rest[0])
        else:
            mode, size, *steps = rest
            seconds = job_s(mode, size, *map(int, steps))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{text!r} is not RATE:SECONDS or RATE:MODE:SIZE[:STEPS], like 40:w8a8-fp8:832x480:50 "
            f"({error})"
        ) from error
    if not (0 < per_hour < float("inf") and 0 < seconds < float("inf")):
        raise ValueError(f"{text!r}: rate and seconds have to be above 0")
    return Kind(":".join([*rest, *(["priority"] if priority else [])]), per_hour, seconds, priority)


def utilization(kinds: Sequence[Kind], cards: int, between_s: float = 0.0) -> float:
    """Return which share of the cards' time the kinds ask for."""
    return sum(k.per_hour * (k.seconds + between_s) for k in kinds) / 3600 / cards


def scaled(kinds: Sequence[Kind], cards: int, share: float, between_s: float = 0.0) -> list[Kind]:
    """Return the same mix at rates that ask for `share` of the cards' time."""
    factor = share / utilization(kinds, cards, between_s)
    return [replace(kind, per_hour=kind.per_hour * factor) for kind in kinds]


def poisson(kinds: Sequence[Kind], jobs: int, seed: int) -> list[Arrival]:
    """Draw `jobs` arrivals that do not know of each other."""
    source = random.Random(seed)
    rates = [kind.per_hour for kind in kinds]
    per_s, at_s = sum(rates) / 3600, 0.0
    arrivals = []
    for kind in source.choices(kinds, rates, k=jobs):
        at_s += source.expovariate(per_s)
        arrivals.append(Arrival(at_s, kind.seconds, kind.priority, kind.name))
    return arrivals


def recorded(path: Path) -> list[Arrival]:
    """Read ended jobs as `GET /jobs` answers them: whole answers or single jobs, one a line.

    A job arrives when it was created, and takes as long as its last attempt did. Jobs that never
    started (cancelled while they waited) and those without an end are left out.

    Raises:
        ValueError: no line has an ended job, or a line is no JSON of one.
    """
    jobs = sorted(_jobs(path), key=lambda job: str(job["created_at"]))
    ended = [job for job in jobs if job.get("started_at") and job.get("finished_at")]
    if not ended:
        raise ValueError(f"{path} has no job that started and ended")
    zero = _seconds(ended[0]["created_at"])
    return [
        Arrival(
            _seconds(job["created_at"]) - zero,
            max(0.0, _seconds(job["finished_at"]) - _seconds(job["started_at"])),
            bool(job.get("priority")),
            f"{job['request']['mode']}:{job['request']['size']}",
        )
        for job in ended
    ]


def _jobs(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            for job in found.get("jobs", [found]):
                yield {"created_at": job["created_at"], "request": job["request"]} | job
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no job of GET /jobs: {error}") from error


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
