"""INT8 products of every device's kernels equal plain torch to the last bit.

The CUDA kernels' rounding and rescaling run in Triton's interpreter; `test_on_cuda.py` runs them on
a GPU. The operations for Ascend are replaced by what their documentation says they compute.
"""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.int8 import product
from quant.kernels.int8.ascend import AscendInt8Product
from quant.kernels.int8.product import Int8Product
from quant.kernels.misfit_counter import CountingKernels
from quant.kernels.self_test import check_int8
from quant.numerics import int8
from quant.numerics.int8_linear import Int8Linear

# The interpreter uses numpy, which warns of the NaN and infinities that these tests use.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def int8_linears(rows: tuple[int, ...], width: int, bias: bool = True) -> list[Int8Linear]:
    linears = []
    for seed, count in enumerate(rows):
        linear = nn.Linear(width, count, bias=bias).to(BF16)
        linear.weight.data = randn(count, width, seed=seed + 10) / (1 + seed)
        linears.append(Int8Linear.from_linear(linear, int8.token_scale(linear.weight.detach())))
    return linears


def tokens(width: int) -> Tensor:
    """Draw [2, 20, width] with a token of zeros, an outlier, a NaN and an infinity."""
    x = randn(2, 20, width)
    x[0, 1] = 0
    x[0, 2, 3] = 900
    x[1, 0, 5] = float("nan")
    x[1, 4, 0] = -float("inf")
    return x


@torch.no_grad()
def one_by_one(linears: list[Int8Linear], x: Tensor) -> Tensor:
    return torch.cat([linear(x) for linear in linears], dim=-1)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
def test_joined_linears_are_the_linears_one_by_one(bias: bool) -> None:
    linears, x = int8_linears((48, 16, 24), 64, bias), tokens(64)
    joined = EagerKernels().int8(linears)
    assert joined.act_scale is None
    expected = one_by_one(linears, x)
    assert expected.isnan().any()
    with torch.no_grad():
        assert_same(joined(x), expected)


def test_the_cpus_product_is_used_only_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    used = product._fastest_multiply()
    product._fastest_multiply.cache_clear()

    def sixteen_bits(act: Tensor, weight: Tensor) -> Tensor:
        return int8.multiply(act, weight).clamp(max=32767)

    monkeypatch.setattr(product, "_int_mm", sixteen_bits)
    assert product._fastest_multiply() is int8.multiply
    product._fastest_multiply.cache_clear()
    monkeypatch.undo()
    assert product._fastest_multiply() is used


def interpreted(linears: list[Int8Linear], x: Tensor) -> Tensor:
    """Return what Triton's interpreter makes: it cuts bits off to BF16, where a GPU rounds."""
    parts = [
        int8.linear(x.float(), each.weight_qdata, each.weight_scale, each.bias) for each in linears
    ]
    return (torch.cat(parts, -1).view(torch.int32) & -0x10000).view(torch.float32).to(BF16)


@pytest.mark.parametrize(("width", "rows"), [(64, (48, 16, 24)), (60, (30, 7))])
@pytest.mark.parametrize("count", [40, 3])
def test_on_a_gpu_the_same_bits(width: int, rows: tuple[int, ...], count: int) -> None:
    from quant.kernels.int8.cuda import CudaInt8Product  # noqa: PLC0415 (Triton's interpreter)

    linears, x = int8_linears(rows, width), tokens(width)
    x = x.view(-1, width)[:count]
    with torch.no_grad():
        assert_same(CudaInt8Product(linears)(x), interpreted(linears, x))


def test_on_a_gpu_long_inputs_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.kernels.int8 import cuda  # noqa: PLC0415

    linears, x = int8_linears((48,), 64), randn(1, 100, 64)
    monkeypatch.setattr(cuda, "SUMS", 48 * 33)
    with torch.no_grad():
        assert_same(cuda.CudaInt8Product(linears)(x), interpreted(linears, x))


class DocumentedOperations(SimpleNamespace):
    """The two operations of `torch_npu`, as its documentation gives them."""

    def npu_dynamic_quant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dim() == 2
        qdata, scale = int8.quantize_per_token(x)
        return qdata, scale.squeeze(1)

    def npu_quant_matmul(
        self, x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor,
        bias: Tensor | None, output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert x2.is_contiguous()
        assert (scale.shape, pertoken_scale.shape) == ((x2.shape[1],), (x1.shape[0],))
        assert scale.dtype is pertoken_scale.dtype is torch.float32
        sums = x1.long() @ x2.long()
        return int8.rescale(sums, pertoken_scale.unsqueeze(1), scale, bias, output_dtype)


def test_on_an_npu_the_documented_operations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", DocumentedOperations())
    linears, x = int8_linears((48, 16, 24), 64), tokens(64)
    with torch.no_grad():
        assert_same(AscendInt8Product(linears)(x), one_by_one(linears, x))


def test_a_side_that_the_npus_operation_does_not_take_is_refused() -> None:
    wide = Int8Linear(torch.zeros(65_536, 1, dtype=torch.int8), torch.ones(65_536, 1), bias=None)
    with pytest.raises(ConversionError, match=r"at most 65535 inputs and outputs.*1 and 65536"):
        AscendInt8Product([wide])


def test_counting_kernels_pass_int8_products_on() -> None:
    kernels = CountingKernels(EagerKernels(), lambda counts, total: None)
    assert isinstance(kernels.int8(int8_linears((8,), 16)), Int8Product)


class Wrong(EagerKernels):
    name = "wrong"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def int8(self, linears: Any) -> Any:
        right = super().int8(linears)
        return lambda x: right(x) * self.factor


def test_the_self_test_notices_a_product_that_computes_something_else() -> None:
    check_int8(Wrong(1.0), CPU)
    for factor in (1.3, float("nan")):
        with pytest.raises(ConversionError, match="INT8 product agrees with plain torch to"):
            check_int8(Wrong(factor), CPU)
