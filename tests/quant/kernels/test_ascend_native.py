"""Native HiFloat8 on an NPU: chosen by doing, refused if it converts otherwise, products right."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.ascend_native import NativeHif8Kernels, NativeHif8Linear
from quant.kernels.eager import EagerKernels
from quant.kernels.self_test import check_kernels
from quant.numerics import hif8
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import scale_policy
from tests.quant.kernels import npu_operations

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return npu_operations.install(monkeypatch)


def test_the_self_test_passes() -> None:
    kernels = NativeHif8Kernels.load(CPU)
    check_kernels(kernels, CPU, quantized=True, per_row_scales=True)


def test_a_chip_without_the_conversion_is_found_out_by_one_number(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    seen: list[int] = []

    def cast(x: Tensor, *_: object) -> Tensor:
        seen.append(x.numel())
        raise RuntimeError("call aclnnCast failed, error code is 161002")

    monkeypatch.setattr(operations, "npu_dtype_cast", cast)
    with pytest.raises(RuntimeError, match="161002"):
        NativeHif8Kernels.load(CPU)
    assert seen == [1]


def test_a_version_without_the_type_is_no_native_one(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    monkeypatch.delattr(operations, "hifloat8")
    with pytest.raises(AttributeError, match="hifloat8"):
        NativeHif8Kernels.load(CPU)


def quantize_with(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def quantize(x: Tensor, factor: Tensor, *given: Any) -> Tensor:
        codes = npu_operations.operation("npu_quantize")(x, factor, *given)
        return change(codes, x.float() * factor)

    return quantize


def test_a_conversion_to_infinity_is_given_clamped_values(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    def overflow(codes: Tensor, value: Tensor) -> Tensor:
        sign = (codes & hif8.SIGN_BIT).where(value.abs() >= 40960, 0)
        return codes.where(~(value.abs() >= 40960), hif8.INFINITY_CODE | sign)

    monkeypatch.setattr(operations, "npu_quantize", quantize_with(overflow))
    kernels = NativeHif8Kernels.load(CPU)
    found = kernels.round_act(torch.tensor([1e30, -1e30, 1.0]).bfloat16(), 0.5)
    expected = torch.tensor([hif8.LARGEST, -hif8.LARGEST, 2.0]).bfloat16()
    assert torch.equal(found, hif8.encode(expected))


def test_a_conversion_that_rounds_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    def down(codes: Tensor, value: Tensor) -> Tensor:
        return hif8.encode(value * (1 - 2.0**-9))  # ties go down

    monkeypatch.setattr(operations, "npu_quantize", quantize_with(down))
    with pytest.raises(ConversionError, match=r"other codes for \d+ of 65536 BF16 values"):
        NativeHif8Kernels.load(CPU)


@pytest.mark.parametrize("scales", [(0.25, 0.25), (0.25, 2.0), (0.3, 0.25)])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_products_have_the_scale_of_each_linear(
    scales: tuple[float, float], *, bias: bool
) -> None:
    linears = []
    for seed, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(seed)
        plain = nn.Linear(64, 16 + 8 * seed, bias=bias, dtype=torch.bfloat16)
        plain.weight.data = torch.randn(plain.weight.shape, generator=generator).bfloat16()
        linears.append(
            Hif8Linear.from_linear(
                plain,
                torch.tensor(scale),
                act_scale=torch.tensor(0.5),
                act_policy=scale_policy("pow2"),
            )
        )
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    native, eager = NativeHif8Kernels(), EagerKernels()
    product = native.quantized(linears)
    assert isinstance(product, NativeHif8Linear)
    assert product.weight_scale.numel() == (1 if len(set(scales)) == 1 else 40)
    with torch.no_grad():
        found = product(native.round_act(x, product.act_scale))
        expected = eager.quantized(linears)(eager.round_act(x, 0.5))
    # The sum is rounded to BF16 once more before the bias is added.
    assert sqnr_db(expected, found) > 45
