"""The seam between the queue and the model: what a job asks of an engine, and hears from it.

An engine turns one complete request into frames and reports to a `JobControl` while it works. It
knows no Redis, no queue and no files. The job's side (`worker/tasks.py`, `worker/job/attempt.py`,
`worker/job/progress.py`) knows no model: of the device it asks what an error means and how full it
is.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.catalog import ModelOffer, ModeOffer
from jobs.record import Stage
from jobs.spec import GenerationRequest

Frame = NDArray[np.uint8]
"""One picture, [H, W, 3] RGB, C-contiguous."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes this process holds on the device now, held at most, and the device's total."""

    allocated_bytes: int
    peak_bytes: int
    total_bytes: int


class EngineDevice(Protocol):
    """What the job's side asks of the device that an engine works on (`worker.device.Device`)."""

    @property
    def name(self) -> str: ...

    def memory(self) -> DeviceMemory | None:
        """The device's memory figures; None where it has no memory of its own."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that memory, the device's or the host's, could not be had."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether after `error` the device can do no more in this process."""

    def empty_cache(self) -> None:
        """Give back memory that nobody refers to any more."""


@dataclass(frozen=True, slots=True)
class ActShares:
    """Shares of the values that went into the quantized layers, 0 to 1."""

    saturated: float
    flushed: float


class JobControl(Protocol):
    """The job's eyes and its brake. Both methods are called from the thread that runs the job."""

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Report `step` of `steps` done in `stage`. Raises what `check` raises."""

    def check(self) -> None:
        """Raise what ends the job if it is to stop; cheap enough for every module's run.

        Each call is a sign of life, too: an engine that makes none for long counts as hung.
        """


@dataclass(slots=True)
class StageSeconds:
    """Seconds the engine spent; `vae_s` grows while the frames of a clip are taken."""

    text_encoder_s: float = 0.0
    denoise_s: float = 0.0
    vae_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A video in the making: `frames` yields them in order as they are decoded, once.

    `act_shares` is a sample of how its activations fitted a quantized mode, if one was taken.
    """

    frames: Generator[Frame]
    num_frames: int
    seconds: StageSeconds = field(default_factory=StageSeconds)
    act_shares: ActShares | None = None


class Engine(Protocol):
    """A resident model in one or more modes."""

    @property
    def model(self) -> ModelOffer: ...

    @property
    def modes(self) -> tuple[ModeOffer, ...]: ...

    @property
    def device(self) -> EngineDevice: ...

    @property
    def tokenizer_text(self) -> bytes | None:
        """What `model.tokenizer` names, as `tokenizer.json`; None where there is no such text."""

    def generate(self, request: GenerationRequest, watch: JobControl, owner: str) -> Clip:
        """Run everything up to the first frame; the caller takes the frames, or closes them.

        Args:
            owner: whose job it is; nothing that is kept of it may serve another owner's job.

        Raises:
            GenerationCancelled: `watch` said so.
            GenerationFailed: with a subclass that says why, such as PromptTooLong.
        """
