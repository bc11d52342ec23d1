"""Stand in for a job's control where a test runs an engine directly."""

from __future__ import annotations

from collections.abc import Callable

from jobs.errors import GenerationCancelled
from jobs.record import Stage
from worker.interface import PreviewClip


class IgnoringControl:
    """A control that ignores progress and never stops the job."""

    def progress(self, stage: Stage, step: int, steps: int) -> None: ...

    def check(self) -> None: ...

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None: ...


class RecordingControl:
    """A control that records progress and checks, and may raise at the n-th check of a stage."""

    def __init__(self, stop_after: tuple[Stage, int] | None = None) -> None:
        self.seen: list[tuple[Stage, int, int]] = []
        self.previews: dict[int, PreviewClip] = {}
        self.checks: dict[Stage | None, int] = {}
        self._stop_after = stop_after

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        self.seen.append((stage, step, steps))

    def check(self) -> None:
        stage = self.seen[-1][0]
        self.checks[stage] = self.checks.get(stage, 0) + 1
        if self._stop_after == (stage, self.checks[stage]):
            raise GenerationCancelled("the test said so")

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None:
        self.previews[step] = make()


class StopAtStep(RecordingControl):
    """A control that cancels the job when a stage reports a given step."""

    def __init__(self, stage: Stage, step: int) -> None:
        super().__init__()
        self._at = (stage, step)

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        super().progress(stage, step, steps)
        if (stage, step) == self._at:
            raise GenerationCancelled("the test said so")
