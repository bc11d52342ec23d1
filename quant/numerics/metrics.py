"""Measure how far a quantized tensor is from the original."""

from __future__ import annotations

import torch
from torch import Tensor


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio 20·log10(‖x‖ / ‖x − x̂‖) of a tensor in dB.

    Equal tensors give +inf, a zero signal with noise −inf. Computed in float32 with float64 sums.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != x_hat.shape:
        raise ValueError(
            f"sqnr_db compares equal shapes, not {list(x.shape)} with {list(x_hat.shape)}"
        )
    signal = x.float().square().sum(dtype=torch.float64)
    noise = (x.float() - x_hat.float()).square().sum(dtype=torch.float64)
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal / noise))
