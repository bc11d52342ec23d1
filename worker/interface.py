"""Define the interface between the queue side and the model side of a worker.

An engine turns one complete request into frames and reports to a `JobControl` meanwhile. It knows
neither Redis nor a queue nor files. The queue side (`worker/tasks.py`, `worker/job/`,
`worker/consumer/`) knows no model. Of the device it only asks what an error means and how much
memory is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.catalog import ModelOffer, ModeOffer
from jobs.record import Stage
from jobs.spec import GenerationRequest

JOB_ID: ContextVar[str | None] = ContextVar("job_id", default=None)
"""The job that this thread works on, for its log lines."""

Frame = NDArray[np.uint8]
"""One frame: [H, W, 3] uint8, RGB, C-contiguous."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of a device, in bytes.

    Attributes:
        allocated_bytes: held by this process now.
        peak_bytes: the most that this process has held.
        total_bytes: the size of the device's memory.
    """

    allocated_bytes: int
    peak_bytes: int
    total_bytes: int


class EngineDevice(Protocol):
    """The part of `worker.device.Device` that the queue side uses."""

    @property
    def name(self) -> str: ...

    def memory(self) -> DeviceMemory | None:
        """Read the device's memory figures; None if it has no memory of its own."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` means that the device's or the host's memory is exhausted."""

    def is_lost(self, error: BaseException) -> bool:
        """Return whether the device is unusable in this process after `error`."""

    def empty_cache(self) -> None:
        """Free memory that is no longer referenced."""


@dataclass(frozen=True, slots=True)
class ActShares:
    """Shares, 0 to 1, of the inputs of quantized layers that saturate or are flushed to zero."""

    saturated: float
    flushed: float


@dataclass(frozen=True, slots=True)
class AttentionShares:
    """What sparse self-attention kept in a job, 0 to 1: of the scores, and of the softmax."""

    density: float
    mass: float


@dataclass(frozen=True, slots=True)
class PreviewClip:
    """A small moving picture of a video that is not finished.

    Attributes:
        frames: [F, H, W, 3] uint8, RGB, C-contiguous.
        fps: how many of them a second of the video has.
    """

    frames: NDArray[np.uint8]
    fps: float


@dataclass(frozen=True, slots=True)
class PreviewPace:
    """How often previews of a job are made: at most one in so many steps and so many seconds.

    The first comes after the first step, and one comes after the last step in any case.
    """

    every_steps: int
    every_s: float


class JobControl(Protocol):
    """Receives an engine's progress and can stop it. Only the thread that runs the job calls it."""

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Report `step` of `steps` done in `stage`. Raises what `check` raises."""

    def check(self) -> None:
        """Raise an exception if the job must stop; cheap enough to call before every module.

        Each call is also a sign of life: an engine that makes none for long counts as hanging.
        """

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None:
        """Call `make` if a preview is due after `step` of `steps` denoising steps, and show it.

        Returns without waiting. It raises nothing, even if `make` does.
        """


@dataclass(slots=True)
class StageSeconds:
    """Seconds the engine spent in each stage; `vae_s` grows while a clip's frames are consumed."""

    text_encoder_s: float = 0.0
    denoise_s: float = 0.0
    vae_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A video that is being decoded.

    Attributes:
        frames: yields the frames once, in order, as they are decoded.
        act_shares: a sample of how the activations fitted a quantized mode, if one was taken.
        attention_shares: of a mode with sparse attention, if a step was sparse.
    """

    frames: Generator[Frame]
    num_frames: int
    seconds: StageSeconds = field(default_factory=StageSeconds)
    act_shares: ActShares | None = None
    attention_shares: AttentionShares | None = None


class Engine(Protocol):
    """A loaded model in one or more modes."""

    @property
    def model(self) -> ModelOffer: ...

    @property
    def modes(self) -> tuple[ModeOffer, ...]: ...

    @property
    def device(self) -> EngineDevice: ...

    @property
    def tokenizer_text(self) -> bytes | None:
        """The `tokenizer.json` whose fingerprint is `model.tokenizer`; None if there is none."""

    @property
    def preview_pace(self) -> PreviewPace | None:
        """How often it makes previews of a job; None if it makes none."""

    def generate(self, request: GenerationRequest, control: JobControl, owner: str) -> Clip:
        """Run everything up to the first frame; the caller consumes or closes the frames.

        Args:
            owner: the owner of the job; nothing cached for it may serve another owner's job.

        Raises:
            GenerationCancelled: raised by `control`.
            GenerationFailed: or a subclass that says why, such as PromptTooLong.
        """

    def tiny_job(self, mode: str, control: JobControl) -> tuple[GenerationRequest, Clip]:
        """Run a mode in the smallest job that goes through all stages; return its request as well.

        Its size need not be offered. It raises and its frames are consumed as with `generate`.
        """
