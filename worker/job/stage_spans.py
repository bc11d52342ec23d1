"""Make the stages of an attempt spans of its trace.

The engine knows nothing of traces: text encoding, denoising and decoding are told apart by what it
reports (`worker/job/progress.py`). Encoding and storing are blocks in `worker/job/generation.py`.
Decoding is inside encoding, which takes its frames as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from jobs.errors import GenerationCancelled, StaleAttempt
from jobs.record import Stage
from jobs.telemetry import tracing
from jobs.telemetry.tracing import Span
from worker.job.progress import JobReturned

MOST_EVENTS: Final = 100
"""Steps of a stage that become events of its span. With more steps it is each second, third …; a
span keeps 128 events."""

SPANS: Final = (Stage.TEXT_ENCODER, Stage.DENOISE, Stage.VAE)
"""The stages that are told apart by what the engine reports."""


STOPS: Final = (GenerationCancelled, StaleAttempt, JobReturned)
"""What ends a stage early and is no failure."""


class StageSpans:
    """The span of the stage that the engine is in. Only the thread that runs the job uses it."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._span: Span = tracing.OFF

    def report(self, stage: Stage, step: int, steps: int) -> None:
        """Note that the engine has done `step` of `steps` in `stage`."""
        if stage is not self._stage:
            self._enter(stage)
        if stage is Stage.DENOISE and step == 0:
            self._span.set({"wan.steps": steps})
        elif stage in SPANS and step > 0 and step % -(-steps // MOST_EVENTS) == 0:
            self._span.event("step", {"step": step})

    def end(self, error: BaseException | None = None) -> None:
        """End the current stage."""
        if error is not None and not isinstance(error, STOPS):
            self._span.fail(type(error).__name__)
        self._span.end()
        self._span = tracing.OFF

    def _enter(self, stage: Stage) -> None:
        self.end()
        self._stage = stage
        if stage in SPANS:
            self._span = tracing.begin(stage.value)


@contextmanager
def stage_spans() -> Iterator[StageSpans | None]:
    """Follow the stages of an attempt in the block; None if nothing is traced.

    It begins with the text encoder, which reports nothing if the embeddings are cached.
    """
    if not tracing.is_on():
        yield None
        return
    spans = StageSpans()
    spans.report(Stage.TEXT_ENCODER, 0, 1)
    try:
        yield spans
    except BaseException as error:
        spans.end(error)
        raise
    spans.end()


def stage_span(name: str) -> AbstractContextManager[Span]:
    """Make the block a span of the attempt."""
    return tracing.span(name, stops=STOPS)
