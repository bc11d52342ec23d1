"""Find out which accelerators this process can use, for the worker and the toolkit.

`torch.npu` (Ascend, from `torch_npu`) has the same interface as `torch.cuda`, so one code path
serves both. `torch_npu` is imported by name and only on request (`quant/ascend.py`), because the
import claims the process's accelerator.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final, Literal

import torch

from quant import ascend
from quant.errors import QuantError

Accelerator = Literal["npu", "cuda"]
ACCELERATORS: Final[tuple[Accelerator, ...]] = ("npu", "cuda")


def backend(kind: Accelerator) -> ModuleType:
    """Return `torch.cuda` or `torch.npu`; the latter exists after `unavailable_reason` only."""
    module: ModuleType = getattr(torch, kind)
    return module


def unavailable_reason(kind: Accelerator) -> str | None:
    """Return why `kind` cannot be used, with the remedy, or None if it can."""
    if kind == "cuda":
        if torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} finds no usable cuda device"
    problem = ascend.import_problem()
    if problem is not None:
        return problem
    try:
        return None if backend("npu").is_available() else ascend.card_problem()
    except RuntimeError as error:
        return ascend.start_problem(error)


def configure(kind: Accelerator) -> None:
    """Set what has to hold in every process that computes on `kind`, before its first operation.

    On Ascend cards, float32 means float32: by default their convolutions round what they multiply
    to HF32, which has fewer mantissa bits. The private layouts of tensors are off, because they
    lose precision in strided views (`torch_npu` itself warns of it).
    """
    if kind == "npu":
        npu = backend("npu")
        npu.conv.allow_hf32 = False
        npu.matmul.allow_hf32 = False
        npu.config.allow_internal_format = False


def usable_device(name: str) -> torch.device:
    """Return the device named by a `--device` option, ready to compute.

    Raises:
        QuantError: the device cannot be used here; the message gives the reason.
    """
    for kind in ACCELERATORS:
        if kind == name:
            if (reason := unavailable_reason(kind)) is not None:
                raise QuantError(f"device {name} is not available here: {reason}; use --device cpu")
            configure(kind)
    return torch.device(name)


def available_accelerator() -> Accelerator | None:
    """Return the first accelerator that can be used without importing anything, or None."""
    loaded = (kind for kind in ACCELERATORS if hasattr(torch, kind))
    return next((kind for kind in loaded if backend(kind).is_available()), None)
