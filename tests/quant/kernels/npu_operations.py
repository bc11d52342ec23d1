"""Let kernels for Ascend run on CPU tensors, on the references of the simulated card.

They have the signatures of torch_npu 2.13. What an operation rounds inside is rounded as torch
does in `quant.kernels.eager`, so that kernels can be compared with it to the last bit.
"""

import sys
from types import ModuleType

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.npu.stand_in.references import HIFLOAT8, REFERENCES


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    """Compute torch's layer norm as the card does: of two types in float32, rounded once."""
    found: Tensor = REFERENCES["aten::native_layer_norm"](
        input, normalized_shape, weight, bias, eps
    )[0]
    return found


def operation(name: str):
    """Return the reference of `torch_npu.name`."""
    return REFERENCES[f"npu::{name}"]


def install(patch: pytest.MonkeyPatch) -> ModuleType:
    """Put a module `torch_npu` with the references in place of the real one."""
    patch.setattr(F, "layer_norm", layer_norm)
    patch.setenv("STAND_IN_SOC", "Ascend950PR_9599")  # the chip that has all operations
    module = ModuleType("torch_npu")
    for name, reference in REFERENCES.items():
        setattr(module, name.partition("::")[2], reference)
    module.hifloat8 = HIFLOAT8  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "torch_npu", module)
    return module
