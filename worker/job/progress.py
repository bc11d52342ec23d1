"""The engine's view of its job: it reports here where it is, and hears here that it is to stop.

Nothing here waits: Redis is asked and told by the `LeaseKeeper`'s thread. So the engine may call
hundreds of times a second, and a Redis that is away does not hold it up.
"""

from __future__ import annotations

import time
from typing import Final

from jobs import durations
from jobs.durations import Durations
from jobs.errors import GenerationCancelled, GenerationTimedOut
from jobs.record import Progress, Stage
from jobs.spec import GenerationRequest
from worker.job.lease import LeaseKeeper
from worker.job.watchdog import Watchdog
from worker.process.drain import Drain, JobInHand
from worker.process.stats import StepTimes
from worker.settings import StallLimits

STALLED: Final = 10
"""A step that takes this many times the median hangs."""

STALLED_SLOW: Final = 3
"""Nor does one hang before this many times what only one step in ten exceeds: under a step cache
most steps may be short, and a full one comes all the same."""

FINISH_S: Final = 600.0
"""The most silence once the last step of a stage is done, and while the MP4 is finished and stored:
that depends on a disk or a network, not on the device."""

WEIGHT_OF_PACE: Final = 2
"""The pace measured in earlier jobs counts as much as this many steps of the job itself."""


class GivenBack(Exception):
    """The worker is told to stop, and this job is to be run by another."""


class JobClock:
    """Follows one job from step to step. Used by the thread that runs the job, and no other."""

    def __init__(
        self,
        request: GenerationRequest,
        measured: Durations | None,
        times: StepTimes,
        limits: StallLimits,
    ) -> None:
        """measured: the pace of jobs of this shape, None where none has run."""
        self._request = request
        self._shape = durations.shape(request)
        self._pace = measured
        self._times = times
        self._limits = limits
        self._start = self._since = time.monotonic()
        self._stage: Stage | None = None
        self._step = self._steps = 0
        self._apart_s = 0.0  # spent on texts and denoising, which are estimated by themselves
        self.own_steps: list[float] = []

    def at(self, stage: Stage, step: int, steps: int) -> None:
        """The job is at this place now."""
        now = time.monotonic()
        if self._stage is not None and self._step < self._steps:
            # Since the last report the job was in the stage of that report: either steps of it
            # were done, or, for the text encoder, the next stage begins, which is its end.
            done = step - self._step if stage is self._stage else self._steps - self._step
            if done > 0:
                self._add(self._stage, (now - self._since) / done, done)
        self._stage, self._step, self._steps, self._since = stage, step, steps, now

    def silence_s(self) -> float:
        """How long the job may be silent from here on."""
        if self._stage is None or self._stage is Stage.MP4 or self._step == self._steps:
            return max(FINISH_S, self._limits.floor_s)
        median = self._times.median(self._shape, self._stage)
        slow = self._times.slow(self._shape, self._stage)
        if median is None or slow is None:
            return self._limits.first_step_s
        return max(STALLED * median, STALLED_SLOW * slow, self._limits.floor_s)

    def seconds_left(self) -> float | None:
        """Until the job's end, as well as it is known; None where nothing is.

        Where jobs of the shape were measured, that is their time for the steps that are left,
        corrected by how fast this job's own steps were, and what is left of their time for
        everything else. Where none was, it is known from the first step of the denoising on: the
        steps of this stage that are left take as long as the ones that were seen. What comes after
        the stage is then missing from the estimate (of a 50-step job some per cent).
        """
        if self._stage is None:
            return None
        in_stage = self._steps - self._step
        if self._pace is None:
            step_s = self._times.median(self._shape, self._stage)
            if step_s is None or self._stage not in (Stage.DENOISE, Stage.VAE):
                return None
            return in_stage * step_s
        in_texts_s = time.monotonic() - self._since if self._stage is Stage.TEXT_ENCODER else 0.0
        spent_s = time.monotonic() - self._start - self._apart_s - in_texts_s
        left_s = max(0.0, self._pace.rest_s - spent_s)
        if self._stage is Stage.TEXT_ENCODER:
            # The pace's is an average with jobs that have nothing to encode.
            texts_s = self._times.median(self._shape, self._stage) or self._pace.texts_s
            left_s += max(0.0, texts_s - in_texts_s)
            return left_s + self._request.num_inference_steps * self._pace.step_s
        if self._stage is Stage.DENOISE:
            return left_s + in_stage * self._step_s(self._pace)
        return left_s

    def _step_s(self, measured: Durations) -> float:
        total = WEIGHT_OF_PACE * measured.step_s + sum(self.own_steps)
        return total / (WEIGHT_OF_PACE + len(self.own_steps))

    def _add(self, stage: Stage, seconds: float, count: int) -> None:
        self._times.add(self._shape, stage, seconds)
        if stage in (Stage.TEXT_ENCODER, Stage.DENOISE):
            self._apart_s += seconds * count
        if stage is Stage.DENOISE:
            self.own_steps += [seconds] * count


class JobProgress:
    """The `JobControl` of one attempt."""

    def __init__(
        self,
        lifeline: LeaseKeeper,
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
