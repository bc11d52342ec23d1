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
"""Neighbouring channels that are mixed; more gain nothing and take longer (docs/log.md).

Its root is a power of two, so that devices that divide differently get the same bits."""

CHUNK = 1 << 24
"""Values that are rotated at once."""


def rotate_groups(x: Tensor) -> Tensor:
    """Multiply each `GROUP` neighbours of x [..., D] by the Hadamard matrix over sqrt(GROUP).

    D is a multiple of GROUP. The sums are FP32, in a fixed order, and the result has the type of x.
    Rows are rotated `CHUNK` values at a time, so that little memory is needed beside the result.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    step = max(1, CHUNK // x.shape[-1])
    for source, target in zip(torch.split(rows, step), torch.split(out, step), strict=True):
        target.copy_(_rotate_rows(source))
    return out.view(x.shape)


def _rotate_rows(x: Tensor) -> Tensor:
    bits = GROUP.bit_length() - 1
    groups = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    groups = groups.view(x.shape[0], -1, *(2,) * bits)
    for dim in range(-1, -bits - 1, -1):
        first, second = groups.unbind(dim)
        difference = first - second
        first += second
        second.copy_(difference)
    return groups.div_(math.sqrt(GROUP)).view(x.shape)
