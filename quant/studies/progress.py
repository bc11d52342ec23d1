"""Show a study's progress: what it will cost before it starts, then a bar with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from tqdm import tqdm

_LOG_EVERY_S = 30.0
"""How often the bar is written where nobody watches it grow, as in a log file."""


class StudyProgress:
    """A bar over the passes of a study. Create it with `study_progress`."""

    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar
        self._begun: float | None = None
        self._announced = False

    def advance(self, passes: int = 1) -> None:
        """Count finished passes; after the second call, say how long the others will take."""
        now = time.monotonic()
        self._bar.update(passes)
        if self._begun is None:
            self._begun, self._first = now, self._bar.n  # the first call holds what is done once
            return
        if not self._announced and self._bar.total is not None:
            self._announced = True
            each = (now - self._begun) / max(self._bar.n - self._first, 1)
            left = timedelta(seconds=round((self._bar.total - self._bar.n) * each))
            end = datetime.now().astimezone() + left
            self.note(f"about {left} (h:mm:ss) left, until {end:%Y-%m-%d %H:%M}")

    def skip(self, passes: int) -> None:
        """Count passes that an earlier run has done; they do not enter the estimate."""
        self._bar.initial += passes
        self._bar.update(passes)
        self._begun = None

    def describe(self, text: str) -> None:
        """Say what is being done, in front of the bar."""
        self._bar.set_description(text, refresh=False)

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        tqdm.write(text, file=sys.stderr)


@contextmanager
def study_progress(cost: str, total: int, done: int = 0) -> Iterator[StudyProgress]:
    """Announce a study and yield its bar.

    Args:
        cost: what will be done and what it takes, in words, such as "640 passes of 40 blocks".
        total: how many passes there are in all, of which `done` were done by an earlier run.
    """
    tqdm.write(f"{cost}; Ctrl-C keeps what is done", file=sys.stderr)
    if done:
        tqdm.write(f"going on after {done} of {total} passes", file=sys.stderr)
    every_s = 0.1 if sys.stderr.isatty() else _LOG_EVERY_S
    with tqdm(total=total, initial=done, unit="pass", mininterval=every_s, file=sys.stderr) as bar:
        yield StudyProgress(bar)
