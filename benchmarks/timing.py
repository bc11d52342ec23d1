"""Seconds on a device: the median of some runs after some that do not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians_ms(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
) -> dict[str, float]:
    """Milliseconds of each, measured from outside, with the device done before and after.

    They take turns: a card that grows hot slows all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(found), 3) for name, found in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """As results are labelled."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
