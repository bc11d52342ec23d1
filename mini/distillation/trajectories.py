"""Record what the teacher would do in each of the student's steps.

A segment leads from one of the student's noise levels to the next. Its target is the velocity whose
one Euler step ends where the guided teacher's many steps end. The next segment begins there, or,
in later rounds, where the student's own step ends, so that the student learns to go on from its own
errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from mini.distillation.schedule import Schedule

Weights = Mapping[str, Tensor]
TRAIN_TIMESTEPS = 1000
_STORED = torch.float16


def velocity(
    transformer: WanTransformer3DModel,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    weights: Weights,
) -> Tensor:
    """Run the transformer with some of its weights replaced.

    Args:
        latents: [B, C, F, H, W].
        timesteps: [B], 1000 times sigma.
        text: [B, T, D], embedded captions.
        weights: by parameter.

    Returns:
        [B, C, F, H, W] float32.
    """
    dtype = transformer.dtype
    inputs = (latents.to(dtype), timesteps, text.to(dtype))
    found: Tensor = functional_call(transformer, dict(weights), inputs, {"return_dict": False})[0]
    return found.float()


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What N trajectories passed through, with S segments each.

    Attributes:
        states: where segments begin, [N, S, C, F, H, W] float16.
        targets: the teacher's velocities over whole segments, of the same shape and type.
        text: embedded captions, [N, T, D].
        errors: of the student when it was recorded, [N, S] float32: the squared error of its
            velocity over the target's square.
    """

    states: Tensor
    targets: Tensor
    text: Tensor
    errors: Tensor

    def __len__(self) -> int:
        """Return the number of trajectories."""
        return len(self.states)

    def save(self, file: Path) -> None:
        """Write a file, which is there as a whole or not at all."""
        unfinished = file.with_suffix(".part")
        save_file({name: getattr(self, name).contiguous() for name in _FIELDS}, unfinished)
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path, device: torch.device) -> Trajectories:
        """Read a file of `save`."""
        return cls(**load_file(file, device=str(device)))

    @classmethod
    def join(cls, parts: list[Trajectories]) -> Trajectories:
        """Put trajectories one after another."""
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in _FIELDS})


_FIELDS = ("states", "targets", "text", "errors")


@dataclass(frozen=True, slots=True)
class Recorder:
    """The teacher, and what records it.

    Attributes:
        guidance_scale: of classifier-free guidance.
        teacher_steps: of the midpoint method in a segment.
        empty: the embedded empty caption, [1, T, D].
    """

    transformer: WanTransformer3DModel
    schedule: Schedule
    guidance_scale: float
    teacher_steps: int
    empty: Tensor

    @property
    def passes(self) -> int:
        """Return the passes of the transformer for a trajectory, the student's included."""
        return len(self.schedule) * (4 * self.teacher_steps + 1)

    @torch.no_grad()
    def record(
        self, noise: Tensor, text: Tensor, student: Weights, *, follow_student: bool
    ) -> Trajectories:
        """Go from noise to videos, segment by segment.

        Args:
            noise: [N, C, F, H, W] float32.
            text: embedded captions, [N, T, D].
            student: its weights, by parameter.
            follow_student: begin the next segment where the student's step ends.
        """
        states, targets, errors = [], [], []
        latents = noise
        for segment in range(len(self.schedule)):
            length = self.schedule.length(segment)
            target = (self._end(latents, text, segment) - latents) / length
            timesteps = self.schedule.timesteps[segment].expand(len(latents))
            own = velocity(self.transformer, latents, timesteps, text, student)
            states.append(latents.to(_STORED))
            targets.append(target.to(_STORED))
            errors.append((own - target).square().mean((1, 2, 3, 4)) / _square(target))
            latents = latents + length * (own if follow_student else target)
        return Trajectories(
            torch.stack(states, 1), torch.stack(targets, 1), text, torch.stack(errors, 1)
        )

    def _end(self, latents: Tensor, text: Tensor, segment: int) -> Tensor:
        """Follow the guided teacher to the end of a segment, by the midpoint method."""
        for step in range(self.teacher_steps):
            start, middle, end = (
                self.schedule.between(segment, (step + part) / self.teacher_steps)
                for part in (0.0, 0.5, 1.0)
            )
            halfway = latents + (middle - start) * self._guided(latents, start, text)
            latents = latents + (end - start) * self._guided(halfway, middle, text)
        return latents

    def _guided(self, latents: Tensor, sigma: float, text: Tensor) -> Tensor:
        both = torch.cat((latents, latents))
        texts = torch.cat((text, self.empty.expand_as(text)))
        timesteps = torch.full((len(both),), TRAIN_TIMESTEPS * sigma, device=both.device)
        found = velocity(self.transformer, both, timesteps, texts, {})
        conditional, unconditional = found.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def _square(values: Tensor) -> Tensor:
    return values.square().mean((1, 2, 3, 4))
