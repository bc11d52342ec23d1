"""Measure the median time of calls on a device, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from quant.device import ACCELERATORS, backend

_WAIT_CYCLES = 8_000_000
"""About 4 ms of a GPU's clock; the host needs less than that to enqueue the measured work."""


def medians_ms(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
    *,
    queued: bool = False,
) -> dict[str, float]:
    """Return the median milliseconds of each call, with a synchronized device before and after.

    The calls take turns, so that a device that slows down as it gets hot affects all of them.

    Args:
        queued: measure the device time of work that waits in a busy queue, as within a model,
            without the latency of its launch. Otherwise measure wall-clock time on the host.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            measure = _device_s if queued and device.type == "cuda" else _host_s
            elapsed_s = measure(run, device)
            if number >= warm_up:
                seconds[name].append(elapsed_s)
    return {name: round(1000 * statistics.median(found), 3) for name, found in seconds.items()}


def _host_s(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def _device_s(run: Callable[[], object], device: torch.device) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    synchronize(device)
    torch.cuda._sleep(_WAIT_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    synchronize(device)
    return float(start.elapsed_time(end)) / 1000


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    for kind in ACCELERATORS:
        if device.type == kind:
            backend(kind).synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the device's name for a result."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
