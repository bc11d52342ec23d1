"""Seconds on a device: the median of some runs after some that do not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_WAIT_CYCLES = 8_000_000
"""Some 4 ms of a card's clock: the host takes less to put what is measured into its queue."""


def medians_ms(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
    *,
    queued: bool = False,
) -> dict[str, float]:
    """Milliseconds of each, with the device done before and after.

    They take turns: a card that grows hot slows all of them alike.

    Args:
        queued: measure what the device takes when it has had work before, as within a model, and
            not how soon the host gets it started; otherwise what passes on the host's clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            took = _queued_s(run, device) if queued and device.type == "cuda" else _s(run, device)
            if number >= warm_up:
                seconds[name].append(took)
    return {name: round(1000 * statistics.median(found), 3) for name, found in seconds.items()}


def _s(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def _queued_s(run: Callable[[], object], device: torch.device) -> float:
    begun, done = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    synchronize(device)
    torch.cuda._sleep(_WAIT_CYCLES)  # type: ignore[no-untyped-call]
    begun.record()
    run()
    done.record()
    synchronize(device)
    return float(begun.elapsed_time(done)) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """As results are labelled."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
