"""Call FlashAttention-3, which is the fastest attention on Hopper GPUs, where it is installed.

Two distributions have the same function. `flash-attn-3`, the authors' own, comes from PyTorch's
package index. `fa3-fwd` comes from PyPI and has the forward pass only. See docs/loading.md.

What the function checks itself raises an error. A CUDA error at a launch ends the process, because
its C++ code calls `exit`. The self-test at the start therefore runs every form that a model needs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant.kernels.interface import AttentionScales

HOPPER = 9
"""The major compute capability that FlashAttention-3 is written for."""

MODULES = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules that may have the function, the authors' own first."""


class FlashAttention:
    """Attends q [B, S, heads, D] to k and v [B, T, heads, D]; returns [B, S, heads, D] bf16.

    In FP8 the kernel multiplies the softmax's numerators, which are at most 1, by 256 and rounds
    them to E4M3 as well (arXiv:2407.08608, section 3.3).
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def bf16(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in BF16."""
        return self._call(q, k, v)

    def fp8(self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales) -> Tensor:
        """Attend q, k and v that are E4M3 codes under `scales`."""
        q_descale, k_descale, v_descale = (
            torch.full((q.shape[0], q.shape[2]), each, device=q.device)
            for each in (scales.q, scales.k, scales.v)
        )
        return self._call(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, **descales: Tensor) -> Tensor:
        out = self._function(q, k, v, **descales)
        # Older builds return the logarithms of the sums as well.
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended


def load_flash_attention() -> FlashAttention:
    """Load the function from the first of `MODULES` that is installed.

    Raises:
        ModuleNotFoundError: none is installed.
        Exception: whatever an installed one raises that does not load.
    """
    for name in MODULES:
        try:
            return FlashAttention(import_module(name).flash_attn_func)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ModuleNotFoundError("FlashAttention-3 is not installed (the extra `cuda` has it)")
