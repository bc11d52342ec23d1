"""In which precision the trainings compute."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to BF16 where the device multiplies in it.

    A CPU that has no such instructions would imitate them: a step of the VAE then takes ten times
    as long as in FP32, which it stays in (docs/log.md).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for BF16; of CPUs torch's own library for them knows."""
    if device.type != "cpu":
        return True
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
