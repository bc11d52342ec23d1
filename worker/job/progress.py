"""Track a job's progress, estimate its remaining time, and check whether it must stop.

The engine calls `JobProgress`, up to hundreds of times a second. Nothing here waits: the
`LeaseKeeper`'s thread talks to Redis, so an unreachable Redis does not delay the engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from jobs import durations
from jobs.durations import Durations
from jobs.errors import GenerationCancelled, GenerationTimedOut
from jobs.record import Progress, Stage
from jobs.spec import GenerationRequest
from worker.job.lease import LeaseKeeper
from worker.job.preview import MakeClip, PreviewThread
from worker.job.watchdog import Watchdog
from worker.process.drain import CurrentJob, Drain
from worker.process.stats import StepTimes
from worker.settings import StallLimits

if TYPE_CHECKING:
    from worker.job.stage_spans import StageSpans

STALL_MEDIANS: Final = 10
"""A step counts as hanging once it takes this many times the median."""

STALL_PERCENTILES_90: Final = 3
"""But not before this many times the 90th percentile: with a step cache most steps may be short,
and a full one must not count as hanging."""

FINISH_S: Final = 600.0
"""Longest silence after the last step of a stage, and while the MP4 is finished and stored: how
long that takes depends on a disk or a network, not on the device."""

MEASURED_WEIGHT: Final = 2
"""The step time of earlier jobs weighs as much as this many steps of the job itself."""


class JobReturned(Exception):
    """The worker is stopping, and its job must return to the queue."""


class JobClock:
    """A clock of one job's steps. Only the thread that runs the job uses it."""

    def __init__(
        self,
        request: GenerationRequest,
        measured: Durations | None,
        times: StepTimes,
        limits: StallLimits,
    ) -> None:
        """Start the clock.

        Args:
            measured: the durations of earlier jobs of this shape; None where none has run.
            times: the durations of steps in this process; the job's own are added.
        """
        self._request = request
        self._shape = durations.shape(request)
        self._measured = measured
        self._times = times
        self._limits = limits
        self._start = self._since = time.monotonic()
        self._stage: Stage | None = None
        self._step = self._steps = 0
        self._separate_s = 0.0  # spent on texts and denoising, which are estimated separately
        self.step_seconds: list[float] = []

    def update(self, stage: Stage, step: int, steps: int) -> None:
        """Record that the job has done `step` of `steps` in `stage`."""
        now = time.monotonic()
        if self._stage is not None and self._step < self._steps:
            # Since the last report the job was in the stage of that report. Either it has done
            # steps of it, or the next stage begins: only that marks the text encoder's end.
            done = step - self._step if stage is self._stage else self._steps - self._step
            if done > 0:
                self._add(self._stage, (now - self._since) / done, done)
        self._stage, self._step, self._steps, self._since = stage, step, steps, now

    def allowed_silence_s(self) -> float:
        """Return for how many seconds from now the job may give no sign of life."""
        if self._stage is None or self._stage is Stage.MP4 or self._step == self._steps:
            return max(FINISH_S, self._limits.floor_s)
        median = self._times.median(self._shape, self._stage)
        percentile_90 = self._times.percentile_90(self._shape, self._stage)
        if median is None or percentile_90 is None:
            return self._limits.first_step_s
        return max(
            STALL_MEDIANS * median, STALL_PERCENTILES_90 * percentile_90, self._limits.floor_s
        )

    def seconds_left(self) -> float | None:
        """Estimate the seconds until the job's end; None where nothing is known.

        With durations of earlier jobs of the shape, the estimate is their time for the remaining
        steps, corrected by how fast this job's own steps were, plus what remains of their time for
        everything else. Without them, it starts with the first denoising step: the remaining steps
        of the stage take as long as those seen so far. It then leaves out the later stages, which
        are some per cent of a 50-step job.
        """
        if self._stage is None:
            return None
        in_stage = self._steps - self._step
        if self._measured is None:
            step_s = self._times.median(self._shape, self._stage)
            if step_s is None or self._stage not in (Stage.DENOISE, Stage.VAE):
                return None
            return in_stage * step_s
        in_texts_s = time.monotonic() - self._since if self._stage is Stage.TEXT_ENCODER else 0.0
        spent_s = time.monotonic() - self._start - self._separate_s - in_texts_s
        left_s = max(0.0, self._measured.rest_s - spent_s)
        if self._stage is Stage.TEXT_ENCODER:
            # The earlier jobs' time is an average that includes jobs with nothing to encode.
            texts_s = self._times.median(self._shape, self._stage) or self._measured.text_encoding_s
            left_s += max(0.0, texts_s - in_texts_s)
            return left_s + self._request.num_inference_steps * self._measured.step_s
        if self._stage is Stage.DENOISE:
            return left_s + in_stage * self._step_s(self._measured)
        return left_s

    def _step_s(self, measured: Durations) -> float:
        total = MEASURED_WEIGHT * measured.step_s + sum(self.step_seconds)
        return total / (MEASURED_WEIGHT + len(self.step_seconds))

    def _add(self, stage: Stage, seconds: float, count: int) -> None:
        self._times.add(self._shape, stage, seconds)
        if stage in (Stage.TEXT_ENCODER, Stage.DENOISE):
            self._separate_s += seconds * count
        if stage is Stage.DENOISE:
            self.step_seconds += [seconds] * count


@dataclass(frozen=True, slots=True)
class JobThreads:
    """The threads that run for the duration of a job."""

    lease: LeaseKeeper
    watchdog: Watchdog
    previews: PreviewThread | None = None


class JobProgress:
    """The `JobControl` of one attempt."""

    def __init__(
        self,
        threads: JobThreads,
        clock: JobClock,
        stop_sources: tuple[Drain, CurrentJob],
        deadline_s: float,
        spans: StageSpans | None = None,
    ) -> None:
        """Report to the threads of one attempt, and to the spans of its stages.

        Args:
            stop_sources: what may ask the job to stop besides the lease.
            deadline_s: seconds from now after which the job fails.
        """
        self._lease = threads.lease
        self._watchdog = threads.watchdog
        self._previews = threads.previews
        self._clock = clock
        self._spans = spans
        self._drain, self._job = stop_sources
        self._deadline_s = deadline_s
        self._deadline = time.monotonic() + deadline_s

    def check(self) -> None:
        """Give a sign of life, and raise if the job must stop.

        Raises:
            GenerationCancelled: its caller, or RQ's stop command, cancelled it.
            StaleAttempt: another attempt owns the job by now.
            JobReturned: the worker stops at once.
            GenerationTimedOut: the job has passed its deadline.
        """
        self._watchdog.alive()
        stop = self._lease.stop
        if stop is not None:
            raise stop.with_traceback(None)  # it may be raised more than once
        if self._job.stop:
            raise GenerationCancelled("The job was stopped by RQ's stop command.")
        if self._drain.return_job:
            raise JobReturned
        if time.monotonic() > self._deadline:
            raise GenerationTimedOut(
                f"The job ran into its time limit of {self._deadline_s:.0f} s and was stopped."
            )

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Record and publish how far the job is; raises what `check` raises."""
        self._clock.update(stage, step, steps)
        if self._spans is not None:
            self._spans.report(stage, step, steps)
        self._watchdog.set_limit(self._clock.allowed_silence_s())
        self.check()
        left_s = self._clock.seconds_left()
        rounded_s = None if left_s is None else round(left_s, 1)
        self._lease.publish(Progress(stage=stage, step=step, steps=steps, seconds_left=rounded_s))

    def preview(self, step: int, steps: int, make: MakeClip) -> None:
        """Show a preview if one is due; see `PreviewThread.offer`."""
        if self._previews is not None:
            self._previews.offer(step, steps, make)
