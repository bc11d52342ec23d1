"""Which kernels a card gets is found out by trying them."""

import pytest

from quant.kernels.ascend import AscendKernels
from quant.kernels.ascend_native import NativeHif8Kernels
from quant.kernels.self_test import BlockShape
from tests.npu.stand_in import simulated
from worker.device import Device

pytestmark = pytest.mark.npu


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_are_chosen_by_trial(npu: Device, *, quantized: bool) -> None:
    choice = npu.pick_kernels(quantized=quantized, shape=BlockShape(2, 64, 128))
    assert choice.kernels.name.startswith("ascend")
    needs_triton = quantized and choice.kernels.name == AscendKernels.name
    assert ("multiplies no HiFloat8" in (choice.warning or "")) == needs_triton


@pytest.mark.skipif(simulated.active is None, reason="a real card is what it is")
def test_a_chip_that_converts_to_hifloat8_multiplies_in_it(
    npu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out by doing: the device keeps the name it has told already."""
    monkeypatch.setenv("STAND_IN_SOC", "Ascend950PR_9599")
    choice = npu.pick_kernels(quantized=True, shape=BlockShape(2, 64, 128))
    assert choice.kernels.name == NativeHif8Kernels.name
    assert choice.warning is None
