"""The engine's view of its job: it reports here where it is, and hears here that it is to stop.

Nothing here waits: Redis is asked and told by the `Lifeline`'s thread. So the engine may call
hundreds of times a second, and a Redis that is away does not hold it up.
"""

from __future__ import annotations

import time

from jobs.errors import GenerationCancelled, GenerationTimedOut
from jobs.record import Progress, Stage
from worker.drain import Drain, JobInHand
from worker.lifeline import Lifeline
from worker.steps import JobClock
from worker.watchdog import Watchdog


class GivenBack(Exception):
    """The worker is told to stop, and this job is to be run by another."""


class JobWatch:
    """The `Watch` of one attempt."""

    def __init__(
        self,
        lifeline: Lifeline,
        watchdog: Watchdog,
        clock: JobClock,
        wishes: tuple[Drain, JobInHand],
        deadline_s: float,
    ) -> None:
        """deadline_s: from now on; reaching it is the job's failure."""
        self._lifeline = lifeline
        self._watchdog = watchdog
        self._clock = clock
        self._drain, self._job = wishes
        self._limit_s = deadline_s
        self._deadline = time.monotonic() + deadline_s

    def check(self) -> None:
        """Give a sign of life, and raise if the job is to stop.

        Raises:
            GenerationCancelled: its caller, or RQ's stop command, wants it to.
            StaleAttempt: another attempt owns the job by now.
            GivenBack: the worker is to stop at once.
            GenerationTimedOut: it takes too long.
        """
        self._watchdog.alive()
        stop = self._lifeline.stop
        if stop is not None:
            raise stop.with_traceback(None)  # it is raised more than once
        if self._job.stop:
            raise GenerationCancelled("The job was stopped by RQ's stop command.")
        if self._drain.give_back:
            raise GivenBack
        if time.monotonic() > self._deadline:
            raise GenerationTimedOut(
                f"The job ran into its time limit of {self._limit_s:.0f} s and was stopped."
            )

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Note where the job is and have it published; raises what `check` raises."""
        self._clock.at(stage, step, steps)
        self._watchdog.allow(self._clock.silence_s())
        self.check()
        left_s = self._clock.seconds_left()
        rounded_s = None if left_s is None else round(left_s, 1)
        self._lifeline.tell(Progress(stage=stage, step=step, steps=steps, seconds_left=rounded_s))
