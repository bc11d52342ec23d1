"""Say what the host has, and whether a study's model and streams fit; sizes are in bytes."""

from __future__ import annotations

import os
from pathlib import Path

from quant.errors import StudyError

_GIB = 1 << 30


def fits(model: int, streams: int, free: int) -> bool:
    """Return whether a model in BF16 and float32 at once, and streams, leave half of it free."""
    return 3 * model + streams < 0.5 * free


def check_host(streams: int, points: int, available: int) -> None:
    """Refuse streams that the host has no memory for.

    Raises:
        StudyError: says how much they take, and how much there is.
    """
    if streams > available:
        raise StudyError(
            f"the streams of {points} points to calibrate on take {streams / _GIB:.1f} GiB, and "
            f"the host has {available / _GIB:.1f} GiB of memory free: take fewer points of each "
            "prompt, or fewer prompts"
        )


def available_bytes() -> int:
    """Return what Linux says could be used without swapping, or else what is free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_cores() -> int:
    """Count the cores this process may use; in a container fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
