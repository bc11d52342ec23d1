"""Show a calibration's progress on the terminal: first how long it will take, then a bar.

The estimate is made of the first steps that are run. The very first one is not taken, as it holds
the text encoder and what a device does once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from quant.console import progress_bar, time_left, write_line


class CalibrationProgress:
    """A callback for `run_calibration`, for one calibration of several prompts."""

    def __init__(self, prompts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._prompts = prompts
        self._clock = clock
        self._bar: tqdm[None] | None = None
        self._begun: tuple[int, float] | None = None  # steps done and time, at the first step
        self._announced = False

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done."""
        if self._bar is None:
            self._bar = self._open(done, total)
        elif self._begun is None and total - done > 1:
            self._begun = done, self._clock()
        elif not self._announced and self._begun is not None:
            self._announced = True
            steps, seconds = done - self._begun[0], self._clock() - self._begun[1]
            left, end = time_left((total - done) * seconds / steps)
            write_line(
                f"about {left} for {total - done} steps, until {end}; Ctrl-C keeps the prompts "
                "that are done"
            )
        prompt = min(done * self._prompts // total + 1, self._prompts)
        self._bar.set_description(f"prompt {prompt} of {self._prompts}", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _open(self, done: int, total: int) -> tqdm[None]:
        if done:
            kept = done * self._prompts // total
            write_line(f"going on after prompt {kept} of {self._prompts}")
        return progress_bar(total, "step", done)
