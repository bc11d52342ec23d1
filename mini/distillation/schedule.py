"""Place the student's few steps among the noise levels: evenly in time, before it is shifted.

These are the levels of a worker's mode with `scheduler = "euler"`, number for number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class EvenEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # untyped to mypy here
    """diffusers' Euler, which would spend its last step of few on a noise level next to zero."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Divide the time from 1 to 0 evenly."""
        levels = np.linspace(1, 0, num_inference_steps, endpoint=False)
        super().set_timesteps(sigmas=levels, device=device)


def euler_scheduler(config: Mapping[str, Any]) -> EvenEuler:
    """Make the scheduler that the student is trained for and judged with.

    Args:
        config: of the model's scheduler, whose shift it keeps.
    """
    return EvenEuler(shift=config["flow_shift"])


class Schedule:
    """The noise levels of a student's steps, and those between them.

    Attributes:
        sigmas: [S + 1], from 1 to 0; a segment leads from one to the next.
        timesteps: [S], what the transformer is told of them: 1000 times sigma.
    """

    def __init__(self, config: Mapping[str, Any], steps: int, device: torch.device) -> None:
        scheduler = euler_scheduler(config)
        scheduler.set_timesteps(steps)
        self.sigmas: Tensor = scheduler.sigmas.to(device)
        self.timesteps: Tensor = scheduler.timesteps.to(device)
        self._shift: float = scheduler.config.shift
        self._levels = [float(sigma) for sigma in scheduler.sigmas]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)

    def length(self, segment: int) -> float:
        """Return how far sigma moves in a segment, a negative number."""
        return self._levels[segment + 1] - self._levels[segment]

    def between(self, segment: int, share: float) -> float:
        """Return sigma at a share of a segment's time, as the shift divides it."""
        shift = self._shift
        start, end = (
            sigma / (shift - (shift - 1) * sigma) for sigma in self._levels[segment : segment + 2]
        )
        time = start + share * (end - start)
        return shift * time / (1 + (shift - 1) * time)
