"""Measure how far a quantized tensor is from the original."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for long sums on a device: float64, or float32 where it has no float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio 20·log10(‖x‖ / ‖x − x̂‖) of a tensor in dB.

    Equal tensors give +inf, a zero signal with noise −inf. Computed in float32, summed in
    `sum_dtype`.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != x_hat.shape:
        raise ValueError(
            f"sqnr_db compares equal shapes, not {list(x.shape)} with {list(x_hat.shape)}"
        )
    dtype = sum_dtype(x.device)
    signal = x.float().square().sum(dtype=dtype).cpu().double()
    noise = (x.float() - x_hat.float()).square().sum(dtype=dtype).cpu().double()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal / noise))
