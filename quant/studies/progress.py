"""Show a study's progress: what it will cost before it starts, then a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from quant.console import progress_bar, time_left, write_line

_ANNOUNCED_AFTER = 0.02
"""The share of a study's passes that its estimate is made of: the first ones may be slower."""


class StudyProgress:
    """A bar over the passes of a study. Create it with `study_progress`."""

    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar
        self._begun: tuple[int, float] | None = None  # passes done and time, after the first
        self._announced = False

    def advance(self, passes: int = 1) -> None:
        """Count finished passes; once there are enough, say how long the others will take."""
        now = time.monotonic()
        self._bar.update(passes)
        if self._begun is None:
            self._begun = self._bar.n, now  # the first call holds what a device does once
        elif not self._announced and self._measured > _ANNOUNCED_AFTER * self._bar.total:
            self._announced = True
            each = (now - self._begun[1]) / self._measured
            left, end = time_left((self._bar.total - self._bar.n) * each)
            write_line(f"about {left} left, until {end}")

    @property
    def _measured(self) -> int:
        return 0 if self._begun is None else int(self._bar.n - self._begun[0])

    def skip(self, passes: int) -> None:
        """Count passes that an earlier run has done; they do not enter the estimate."""
        self._bar.initial += passes
        self._bar.update(passes)
        self._begun = None

    def describe(self, text: str) -> None:
        """Say what is being done, in front of the bar."""
        self._bar.set_description(text, refresh=False)


@contextmanager
def study_progress(cost: str, total: int) -> Iterator[StudyProgress]:
    """Announce a study and yield its bar.

    Args:
        cost: what will be done and what it takes, in words, such as "640 passes of 40 blocks".
        total: how many passes there are in all, those of an earlier run included.
    """
    write_line(f"{cost}; Ctrl-C keeps what is done")
    with progress_bar(total, "pass") as bar:
        yield StudyProgress(bar)
