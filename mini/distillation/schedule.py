"""Place the student's few steps among the noise levels: plain Euler steps on UniPC's own levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor


def euler_scheduler(config: Mapping[str, Any], steps: int) -> UniPCMultistepScheduler:
    """Make UniPC of first order without its corrector, which is Euler's method for flows.

    diffusers' FlowMatchEulerDiscreteScheduler spends its last step of few on a noise level next to
    zero; this one divides the time evenly before it shifts it.

    Args:
        config: of the model's scheduler, whose shift it keeps.
    """
    corrections = {"solver_order": 1, "disable_corrector": list(range(steps))}
    return UniPCMultistepScheduler.from_config(config, **corrections)


class Schedule:
    """The noise levels of a student's steps, and those between them.

    Attributes:
        sigmas: [S + 1], from nearly 1 to 0; a segment leads from one to the next.
        timesteps: [S], what the transformer is told of them.
    """

    def __init__(self, config: Mapping[str, Any], steps: int, device: torch.device) -> None:
        scheduler = euler_scheduler(config, steps)
        scheduler.set_timesteps(steps)
        self.sigmas: Tensor = scheduler.sigmas.to(device)
        self.timesteps: Tensor = scheduler.timesteps.float().to(device)
        self._shift: float = scheduler.config.flow_shift
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
