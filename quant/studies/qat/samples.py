"""Give samples to train on: recorded points with the original's velocity, or clips with noise.

A batch depends on nothing but the run's seed and the number of the step, so a run that goes on
after a kill sees the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant.studies.points import Point
from quant.studies.qat.clips import Clip

TIMESTEPS = 1000
"""What a noise level of 1 is as a timestep, in all of Wan's schedules."""
_DROPPED = 0.1
"""The share of samples that get the negative prompt, so that guidance keeps working."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a pass is given, and what it should give.

    Attributes:
        latents: [B, C, F, H, W] float32.
        timestep: [B] float32.
        text: [B, T, D] float32.
        target: velocity, [B, C, F, H, W] float32.
    """

    latents: Tensor
    timestep: Tensor
    text: Tensor
    target: Tensor

    def to(self, device: torch.device) -> Samples:
        """Return a copy on a device."""
        return Samples(*(each.to(device, copy=True) for each in self.tensors))

    def copy_(self, other: Samples) -> None:
        """Take another batch's values, in place."""
        for own, new in zip(self.tensors, other.tensors, strict=True):
            own.copy_(new)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.latents, self.timestep, self.text, self.target

    def rows(self, index: Sequence[int]) -> Samples:
        """Return some of the samples."""
        return Samples(*(each[list(index)] for each in self.tensors))


class Lesson(Protocol):
    """What is trained on, and by which loss.

    Attributes:
        name: of the loss.
        per_item: samples of each prompt or clip.
    """

    @property
    def name(self) -> str:
        """Of the loss."""

    @property
    def per_item(self) -> int:
        """How many samples each prompt, or clip, has."""

    def batch(self, seed: int, step: int, size: int, items: int) -> Samples:
        """Return the samples of a step, on the host, out of the first `items`."""

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the loss, []."""


def relative_error(found: Tensor, reference: Tensor) -> Tensor:
    """Return |found − reference|² / |reference|² of each sample: [B, ...] → [B]."""
    dims = tuple(range(1, found.dim()))
    return (found - reference).square().sum(dims) / reference.square().sum(dims)


@dataclass(frozen=True, slots=True)
class TeacherLesson:
    """Recorded points, and the velocity that the original model has there in float32.

    The loss is the mean of the samples' error energies: what is measured, on other prompts.

    Attributes:
        samples: of all prompts, in order.
    """

    samples: Samples
    per_item: int

    name: ClassVar[str] = "teacher"

    def batch(self, seed: int, step: int, size: int, items: int) -> Samples:
        """Return the samples of a step."""
        return self.samples.rows(indices(seed, step, size, items * self.per_item))

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the mean error energy."""
        return relative_error(predicted, target).mean()


@dataclass(frozen=True, slots=True)
class FlowLesson:
    """Clips, mixed with noise: the loss that Wan itself was trained with (flow matching).

    x_t = (1 − sigma) x + sigma noise, and the velocity should be noise − x. Sigma is logit-normal,
    shifted as in sampling (Esser 2024, arXiv 2403.03206).

    Attributes:
        clips: in order.
        negative: the embedded negative prompt, [T, D].
        shift: of the noise levels.
    """

    clips: Sequence[Clip]
    negative: Tensor
    shift: float

    name: ClassVar[str] = "flow"
    per_item: ClassVar[int] = 1

    def batch(self, seed: int, step: int, size: int, items: int) -> Samples:
        """Return the samples of a step, with noise of their own."""
        draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        chosen = [self.clips[index] for index in indices(seed, step, size, items)]
        sigma = shifted(torch.sigmoid(torch.randn(size, generator=draw)), self.shift)
        dropped = torch.rand(size, generator=draw) < _DROPPED
        text = torch.stack(
            [
                self.negative if gone else clip.text
                for gone, clip in zip(dropped, chosen, strict=True)
            ]
        )
        return _mixed(torch.stack([clip.latents for clip in chosen]), text, sigma, draw)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error."""
        return torch.nn.functional.mse_loss(predicted, target)

    def examination(self, clip: int, levels: int) -> Samples:
        """Return a clip at evenly spread noise levels, with noise that depends on its number."""
        draw = torch.Generator().manual_seed(clip)
        quantiles = (torch.arange(levels) + 0.5) / levels
        normal = torch.distributions.Normal(0.0, 1.0)
        sigma = shifted(torch.sigmoid(normal.icdf(quantiles)), self.shift)  # type: ignore[no-untyped-call]
        each = self.clips[clip]
        latents = each.latents.expand(levels, *each.latents.shape)
        return _mixed(latents, each.text.expand(levels, *each.text.shape), sigma, draw)


def _mixed(clean: Tensor, text: Tensor, sigma: Tensor, draw: torch.Generator) -> Samples:
    noise = torch.randn(clean.shape, generator=draw)
    latents = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    return Samples(latents, sigma * TIMESTEPS, text.contiguous(), noise - clean)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Return noise levels under a flow shift: [B] → [B]."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def samples_of(points: Sequence[Point], velocities: Tensor) -> Samples:
    """Join points, on the host, with the velocities [B, C, F, H, W] that they should give."""
    return Samples(
        torch.cat([each.latents for each in points]),
        torch.cat([each.timestep for each in points]).float(),
        torch.cat([each.text for each in points]).float(),
        velocities.cpu(),
    )


def indices(seed: int, step: int, size: int, count: int) -> list[int]:
    """Return the numbers of a step's samples: all of them once in a random order, then again."""
    places = range(step * size, (step + 1) * size)
    return [_order(seed, place // count, count)[place % count] for place in places]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    draw = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(count, generator=draw).tolist()
    return order
