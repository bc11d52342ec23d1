"""The table look-ups are bit-equal to the arithmetic they replace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.numerics import hif8, reference
from quant.numerics.scaling import POLICIES

POWERS = [2.0**-20, 2.0**-7, 1.0, 2.0**3, 2.0**20]
ODD = [0.3, 1 / 15, 7.0]


def arithmetic(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Compute `fake_quantize` as it is defined, in float32."""
    return (hif8.round_to_hif8(x.float() / scale) * scale).to(x.dtype)


@pytest.mark.parametrize("scale", POWERS + ODD)
def test_fake_quantize_of_every_bf16_is_the_arithmetic(scale: float):
    x = hif8.all_bf16().view(256, 256)
    torch.testing.assert_close(
        reference.fake_quantize(x, torch.tensor(scale)),
        arithmetic(x, torch.tensor(scale)),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [*POWERS[1:4], *ODD])
def test_fake_quantize_is_dequantize_of_quantize(dtype: torch.dtype, scale: float):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    qdata = reference.quantize(x, torch.tensor(scale))
    assert qdata.dtype is torch.uint8
    assert torch.equal(
        reference.dequantize(qdata, torch.tensor(scale), dtype),
        reference.fake_quantize(x, torch.tensor(scale)),
    )


@pytest.mark.parametrize("scale", POWERS)
def test_quantizing_large_bf16_tensors_through_the_table_is_the_arithmetic(scale: float):
    x = hif8.all_bf16().repeat(2)
    expected = hif8.encode(x.float() / scale)
    assert torch.equal(reference.quantize(x, torch.tensor(scale)), expected)


@pytest.mark.parametrize("scale", POWERS + ODD)
@pytest.mark.parametrize("count", [256, 255])  # pairs, and a count that cannot be paired
def test_dequantize_of_every_code_is_the_arithmetic(scale: float, count: int):
    qdata = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    expected = (hif8.decode(qdata, torch.float32) * torch.tensor(scale)).to(torch.bfloat16)
    torch.testing.assert_close(
        reference.dequantize(qdata, torch.tensor(scale)), expected, rtol=0, atol=0, equal_nan=True
    )


def test_dequantize_accepts_views_that_cannot_be_paired():
    qdata = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = hif8.decode(qdata)
    for view in (slice(1, 9), slice(0, 8, 2)):
        assert torch.equal(reference.dequantize(qdata[view], torch.tensor(1.0)), expected[view])


def test_per_channel_scales_multiply_their_rows():
    qdata = torch.randint(0, 0x60, (4, 6), dtype=torch.uint8)
    scale = torch.tensor([[1.0], [0.5], [0.3], [8.0]])
    rows = [reference.dequantize(qdata[i], scale[i, 0]) for i in range(4)]
    assert torch.equal(reference.dequantize(qdata, scale), torch.stack(rows))


def test_per_token_scales_come_from_each_token():
    x = torch.randn(2, 3, 16).to(torch.bfloat16) * torch.tensor([[[1.0], [100.0], [0.0]]])
    x = x.to(torch.bfloat16)
    got = reference.fake_quantize_per_token(x, POLICIES["pow2"])
    for token, result in zip(x.reshape(-1, 16), got.reshape(-1, 16), strict=True):
        amax = token.abs().max().float()
        scale = 1.0 if amax == 0 else 2.0 ** (amax.log2().floor().item() - 3)
        assert torch.equal(result, arithmetic(token, scale))


@given(st.integers(-12, 12), st.integers(0, 2**32 - 1))
def test_a_power_of_two_on_values_and_scale_comes_out_as_it_went_in(power: int, seed: int):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    scale = torch.tensor(2.0**-3)
    assert torch.equal(
        reference.fake_quantize(x * 2.0**power, scale * 2.0**power),
        reference.fake_quantize(x, scale) * 2.0**power,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_rounded_in_pieces(monkeypatch, dtype: torch.dtype):
    """Large tensors are processed in chunks, as on a GPU, where BF16 has no table."""
    x, scale = torch.randn(7, 13, 11, generator=torch.Generator().manual_seed(0)).to(dtype), 0.3
    x = x.transpose(0, 1)
    expected = reference.fake_quantize(x, torch.tensor(scale))
    monkeypatch.setattr(reference, "_CHUNK", 100)
    chunked = reference.fake_quantize(x, torch.tensor([scale]))
    assert chunked.dtype is dtype
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_bf16_is_rounded_once(bias: bool):
    """On every CPU, the result is within half a BF16 step of the exact sum."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(50, 200, generator=generator).bfloat16() for _ in range(2))
    b = torch.randn(50, generator=generator).bfloat16() if bias else None
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if b is None else b.double()
    )
    found = reference.product(x, weight, b)
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_linear_is_the_product_of_what_was_rounded():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, 32, generator=generator).to(torch.bfloat16)
    weight = torch.randn(16, 32, generator=generator).to(torch.bfloat16)
    bias = torch.randn(16, generator=generator).to(torch.bfloat16)
    scale = torch.tensor(0.25)
    got = reference.linear(x, reference.quantize(weight, scale), scale, bias)
    expected = torch.nn.functional.linear(x, reference.fake_quantize(weight, scale), bias)
    assert torch.equal(got, expected)
