"""Set the clock of a process ahead by CLOCK_AHEAD_S seconds.

Python imports this at its start where this folder is in PYTHONPATH. It shifts what Python reads as
the time of day; the clocks that only grow, and the times of files, stay as they are.
"""

from __future__ import annotations

import datetime
import os
import time
from datetime import datetime as real_datetime
from typing import Any, Self

AHEAD_S = float(os.environ["CLOCK_AHEAD_S"])

_time, _time_ns = time.time, time.time_ns


class _IsAnyDatetime(type):
    """Count every moment as an instance, also those that libraries in C make."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, real_datetime)


class _Ahead(real_datetime, metaclass=_IsAnyDatetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(time.time(), tz)


def _shift(time_module: Any, datetime_module: Any) -> None:
    time_module.time = lambda: _time() + AHEAD_S
    time_module.time_ns = lambda: _time_ns() + int(AHEAD_S * 1e9)
    datetime_module.datetime = _Ahead


_shift(time, datetime)
