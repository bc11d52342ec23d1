"""Change a linear's product before it is quantized, without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Identity:
    """Change nothing; the base of all transforms.

    Attributes:
        bytes_per_weight: that the transform keeps beside a quantized weight.
        reads: how often it reads an input more.
    """

    bytes_per_weight: ClassVar[int] = 0
    reads: ClassVar[int] = 0

    def divisors(self, weight: Tensor, channels: Tensor) -> Tensor | None:
        """Return what each channel of the input is divided by, and each column multiplied by.

        Args:
            weight: [N, K].
            channels: the largest magnitude of each channel of the input in calibration, [K].
        """
        del weight, channels
        return None

    def kept(self, x: Tensor) -> Tensor | None:
        """Return a mask [B, ..., K] of the channels of x [B, ..., K] that stay in BF16."""
        del x
        return None


@dataclass(frozen=True, slots=True)
class SmoothQuant(Identity):
    """Move magnitude from inputs to weights (Xiao 2023).

    Each linear has divisors of its own, and its input is divided at run time. A service would fold
    them into the norm before it, with the same ones for all linears that share the input.

    Attributes:
        alpha: 0 leaves the inputs as they are, 1 makes all of their channels equally large.
    """

    alpha: float = 0.5

    def divisors(self, weight: Tensor, channels: Tensor) -> Tensor | None:
        """Return max|x|**alpha / max|w|**(1 − alpha) of each channel; 1 where one of them is 0."""
        largest = weight.float().abs().amax(0)
        divisors = channels.float() ** self.alpha / largest ** (1 - self.alpha)
        usable = (channels > 0) & (largest > 0) & divisors.isfinite() & (divisors > 0)
        return torch.where(usable, divisors, 1.0)


@dataclass(frozen=True, slots=True)
class OutlierColumns(Identity):
    """Keep channels of the input with a value from `threshold` on in BF16 (LLM.int8(), 2022).

    They are found when the model runs, for each sample by itself, so all weights stay at hand in
    BF16, too.
    """

    threshold: float = 6.0

    bytes_per_weight: ClassVar[int] = 2
    reads: ClassVar[int] = 1

    def kept(self, x: Tensor) -> Tensor | None:
        """Return the mask, [B, 1, K] for x [B, S, K]."""
        dims = tuple(range(1, x.dim() - 1))
        return x.abs().amax(dims, keepdim=True) >= self.threshold
