"""Which kernels a card gets is found out by trying them."""

import pytest

from quant.kernels.ascend import AscendKernels
from quant.kernels.self_test import BlockShape
from worker.device import Device

pytestmark = pytest.mark.npu

MODES = ("bf16", "w8a8")


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_are_chosen_by_trial(npu: Device, *, quantized: bool) -> None:
    choice = npu.pick_kernels(quantized=quantized, shape=BlockShape(2, 64, 128))
    assert choice.kernels.name.startswith("ascend")
    needs_triton = quantized and choice.kernels.name == AscendKernels.name
    assert ("multiplies no HiFloat8" in (choice.warning or "")) == needs_triton
