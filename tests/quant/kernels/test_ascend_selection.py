"""Which kernels an NPU gets, with references in place of torch_npu and the CPU as the device."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from quant.errors import ConversionError
from quant.kernels.ascend import AscendKernels
from quant.kernels.ascend_native import converts_hifloat8
from quant.kernels.selection import KernelChoice, _pick_on_npu, multiplies_codes, pick_kernels
from quant.kernels.self_test import check_kernels
from tests.quant.kernels import npu_operations

CPU = torch.device("cpu")
TRITON = "quant.kernels.ascend_triton"


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Be a machine with an NPU that has no native HiFloat8, and without Triton for it."""
    npu = SimpleNamespace(get_device_name=lambda _: "Ascend910B2")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setitem(sys.modules, TRITON, None)
    module = npu_operations.install(monkeypatch)
    monkeypatch.setattr(module, "npu_dtype_cast", unsupported)
    return module


def unsupported(*_: object, **__: object) -> None:
    raise RuntimeError("call aclnnCast failed, error code is 161002")


def pick(*, quantized: bool) -> KernelChoice:
    check = partial(check_kernels, device=CPU, quantized=quantized)
    return _pick_on_npu(CPU, check, quantized=quantized)


def test_plain_operations_run_bf16_without_a_warning() -> None:
    choice = pick(quantized=False)
    assert (choice.kernels.name, choice.warning) == ("ascend", None)


def test_plain_operations_run_quantized_modes_with_a_warning_that_says_why() -> None:
    choice = pick(quantized=True)
    assert choice.kernels.name == "ascend"
    assert choice.warning is not None
    assert choice.warning.startswith("Ascend910B2 multiplies no HiFloat8, and the Triton kernels")
    assert f"ModuleNotFoundError: import of {TRITON}" in choice.warning
    assert choice.warning.endswith("save memory, and take longer than bf16.")


@pytest.mark.parametrize("quantized", [False, True])
def test_triton_kernels_that_pass_are_taken_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, *, quantized: bool
) -> None:
    class AscendTritonKernels(AscendKernels):
        name = "ascend+triton"

    module = ModuleType(TRITON)
    module.AscendTritonKernels = AscendTritonKernels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, TRITON, module)
    choice = pick(quantized=quantized)
    assert (choice.kernels.name, choice.warning) == ("ascend+triton", None)


def test_native_hifloat8_comes_first_for_quantized_modes_only(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    monkeypatch.setattr(operations, "npu_dtype_cast", npu_operations.operation("npu_dtype_cast"))
    choice = pick(quantized=True)
    assert (choice.kernels.name, choice.warning) == ("ascend with native HiFloat8", None)
    assert pick(quantized=False).kernels.name == "ascend"


@pytest.mark.parametrize("quantized", [False, True])
def test_plain_torch_runs_if_an_operation_fails(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType, *, quantized: bool
) -> None:
    monkeypatch.setattr(operations, "npu_fusion_attention", unsupported)
    choice = pick(quantized=quantized)
    assert choice.kernels.name == "eager"
    assert choice.warning is not None
    assert choice.warning.startswith("The kernels for Ascend910B2 do not run (RuntimeError: call")


def test_a_full_device_is_no_reason_for_other_kernels(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("NPU out of memory")

    monkeypatch.setattr(operations, "npu_rms_norm", full)
    with pytest.raises(torch.OutOfMemoryError):
        pick(quantized=True)


def test_fp8_attention_is_refused() -> None:
    device: Any = SimpleNamespace(type="npu")  # torch knows the type with torch_npu only
    with pytest.raises(ConversionError, match=r"no kernels of it for Ascend NPUs; take a recipe"):
        pick_kernels(device, quantized=True, fp8_attention=True)


def test_products_are_in_eight_bits_where_one_number_is_converted(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    assert not multiplies_codes(CPU)
    converts_hifloat8.cache_clear()
    assert not converts_hifloat8(CPU)
    converts_hifloat8.cache_clear()
    monkeypatch.setattr(operations, "npu_dtype_cast", npu_operations.operation("npu_dtype_cast"))
    assert converts_hifloat8(CPU)
    converts_hifloat8.cache_clear()


@pytest.mark.parametrize(
    "text", ["NPU function error, error code is 507015", "EL0004: Failed to allocate memory."]
)
def test_a_lost_or_full_card_is_not_one_without_hifloat8(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType, text: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(text)

    converts_hifloat8.cache_clear()
    monkeypatch.setattr(operations, "npu_dtype_cast", fail)
    with pytest.raises(RuntimeError, match=text[:6]):
        converts_hifloat8(CPU)
    with pytest.raises(RuntimeError, match=text[:6]):
        pick(quantized=True)
