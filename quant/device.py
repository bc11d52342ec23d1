"""Which accelerators this process may use. The worker and the toolkit ask here and nowhere else.

CUDA and Ascend (`torch_npu`) mirror each other's module (`torch.cuda`, `torch.npu`), so what holds
for one holds for the other. `torch_npu` is imported by name and only when it is wanted: importing
it claims the process's accelerator.
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
    """`torch.cuda` or its like; of Ascend only after `why_not` has imported it."""
    found: ModuleType = getattr(torch, kind)
    return found


def why_not(kind: Accelerator) -> str | None:
    """Say why `kind` cannot be used, or None if it can."""
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        # Without CANN's libraries the import ends in ImportError or OSError; beside a CUDA card in
        # RuntimeError.
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch_npu cannot be imported ({repr(error).splitlines()[0][:200]})"
    if not backend(kind).is_available():
        return f"torch {torch.__version__} finds no usable {kind} device"
    return None


def usable_device(name: str) -> torch.device:
    """The device of a `--device`.

    Raises:
        QuantError: it cannot be used here, and why.
    """
    for kind in ACCELERATORS:
        if kind == name and (reason := why_not(kind)) is not None:
            raise QuantError(f"device {name} is not available here: {reason}; use --device cpu")
    return torch.device(name)


def at_hand() -> Accelerator | None:
    """The first that can be used, as far as nothing has to be imported for it."""
    loaded = (kind for kind in ACCELERATORS if hasattr(torch, kind))
    return next((kind for kind in loaded if backend(kind).is_available()), None)
