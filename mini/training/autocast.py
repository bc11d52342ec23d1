"""Choose the precision in which training computes."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return an autocast to BF16 that is enabled if the device has BF16 instructions.

    A CPU without them would emulate them, and a step of the VAE would take ten times as long as in
    FP32 (docs/log.md). It computes in FP32 instead.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device has BF16 instructions; for CPUs torch's oneDNN is asked."""
    if device.type != "cpu":
        return True
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
