"""Rotate vectors by a Hadamard matrix, so that rounding them to few bits costs less.

A score q · k is the same if both vectors are rotated in the same way. The rounding error of a score
is largest where the same channels are large in q and in k, as in Wan. A Hadamard matrix spreads
each channel evenly over its neighbours ("incoherent processing", arXiv:2407.08608, section 3.3).
docs/numerics.md has what it gains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 16
"""Neighbouring channels that are mixed; more gain nothing and take longer (docs/log.md)."""


def rotate_groups(x: Tensor) -> Tensor:
    """Multiply each `GROUP` neighbours of x [..., D] by the Hadamard matrix over sqrt(GROUP).

    D is a multiple of GROUP. The sums are FP32, in a fixed order, and the result has the type of x.
    """
    groups = x.float().reshape(-1, *(2,) * (GROUP.bit_length() - 1))
    for dim in range(groups.dim() - 1, 0, -1):
        first, second = groups.unbind(dim)
        groups = torch.stack((first + second, first - second), dim)
    return (groups / math.sqrt(GROUP)).reshape(x.shape).to(x.dtype)
