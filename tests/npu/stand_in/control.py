"""Control the stand-in's card: read its memory, fill it, lose it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

DEVICE_LOST = 507899
"""The ACL error that a failed card gives to everything that reaches it."""


@cache
def _library() -> Any:
    library = ctypes.CDLL("libstand_in.so")
    for name in ("live_bytes", "peak_bytes", "calls", "synchronizes"):
        getattr(library, f"stand_in_{name}").restype = ctypes.c_int64
    return library


def live_bytes(device: int = 0) -> int:
    """Return the bytes that are allocated on a card, caches of torch's allocator included."""
    return int(_library().stand_in_live_bytes(device))


def peak_bytes(device: int = 0) -> int:
    """Return the most bytes that were allocated on a card since the last `reset`."""
    return int(_library().stand_in_peak_bytes(device))


def synchronizes() -> int:
    """Return how many times the process has waited for a card."""
    return int(_library().stand_in_synchronizes())


def set_bytes(count: int) -> None:
    """Set the memory of each card; what does not fit fails as CANN's allocations do."""
    _library().stand_in_set_bytes(ctypes.c_int64(count))


def lose() -> None:
    """Lose the card: from now on everything that reaches it fails."""
    _library().stand_in_lose(DEVICE_LOST)


def lose_in_synchronize(wait: int) -> None:
    """Lose the card in the n-th wait for it from now, counted from 1."""
    _library().stand_in_lose_in_synchronize(ctypes.c_int64(wait))


def reset() -> None:
    """Bring the card back, with the memory of its environment."""
    _library().stand_in_reset()
