"""Find out which accelerators this process can use, for the worker and the toolkit.

`torch.npu` (Ascend, from `torch_npu`) has the same interface as `torch.cuda`, so one code path
serves both. `torch_npu` is imported by name and only on request, because the import claims the
process's accelerator.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Final, Literal

import torch

from quant.errors import QuantError

Accelerator = Literal["npu", "cuda"]
ACCELERATORS: Final[tuple[Accelerator, ...]] = ("npu", "cuda")


def backend(kind: Accelerator) -> ModuleType:
    """Return `torch.cuda` or `torch.npu`; the latter exists after `unavailable_reason` only."""
    module: ModuleType = getattr(torch, kind)
    return module


def unavailable_reason(kind: Accelerator) -> str | None:
    """Return why `kind` cannot be used, or None if it can."""
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        # Without CANN's libraries the import raises ImportError or OSError; on a machine with a
        # CUDA GPU it raises RuntimeError.
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch_npu cannot be imported ({repr(error).splitlines()[0][:200]})"
    if not backend(kind).is_available():
        return f"torch {torch.__version__} finds no usable {kind} device"
    return None


def usable_device(name: str) -> torch.device:
    """Return the device named by a `--device` option.

    Raises:
        QuantError: the device cannot be used here; the message gives the reason.
    """
    for kind in ACCELERATORS:
        if kind == name and (reason := unavailable_reason(kind)) is not None:
            raise QuantError(f"device {name} is not available here: {reason}; use --device cpu")
    return torch.device(name)


def available_accelerator() -> Accelerator | None:
    """Return the first accelerator that can be used without importing anything, or None."""
    loaded = (kind for kind in ACCELERATORS if hasattr(torch, kind))
    return next((kind for kind in loaded if backend(kind).is_available()), None)
