"""HiFloat8 encoding: exhaustive over all BF16 values, against en_dtypes, and by properties."""

import en_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.numerics import hif8

ALL_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
FINITE = [code for code in range(256) if code not in (0x80, 0x6F, 0xEF)]
finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def all_fp16() -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)


def random_fp32_bits(count: int) -> torch.Tensor:
    """Return floats of uniformly random bits: all exponents, subnormals, infinities and NaNs."""
    generator = torch.Generator().manual_seed(20240916)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int64, generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def encode_with_en_dtypes(x: torch.Tensor) -> torch.Tensor:
    """Return the codes of en_dtypes; it does not saturate, so values are clamped first."""
    clamped = np.clip(x.float().numpy(), -32768.0, 32768.0)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(clamped.astype(en_dtypes.hifloat8).view(np.uint8))


def one(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def test_all_codes_decode_as_en_dtypes_does():
    theirs = ALL_CODES.numpy().view(en_dtypes.hifloat8).astype(np.float32)
    np.testing.assert_array_equal(hif8.decode(ALL_CODES, torch.float32).numpy(), theirs)


@pytest.mark.parametrize("values", [hif8.all_bf16(), all_fp16()], ids=["bf16", "fp16"])
def test_every_16_bit_input_encodes_as_en_dtypes_does(values: torch.Tensor):
    assert torch.equal(hif8.encode(values), encode_with_en_dtypes(values))


def test_ten_million_random_fp32_encode_as_en_dtypes_does():
    values = random_fp32_bits(10_000_000)
    assert torch.equal(hif8.encode(values), encode_with_en_dtypes(values))


def test_neighbours_of_every_midpoint_encode_as_en_dtypes_does():
    values = hif8.code_values()
    grid = values[values.isfinite()].unique()
    middle = ((grid[1:].double() + grid[:-1].double()) / 2).float()
    infinity = torch.tensor(float("inf"))
    near = torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    assert torch.equal(hif8.encode(near), encode_with_en_dtypes(near))


def test_finite_codes_survive_a_round_trip_in_every_dtype():
    codes = torch.tensor(FINITE, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(hif8.encode(hif8.decode(codes, dtype)), codes)


def test_the_bf16_table_is_the_arithmetic():
    values = hif8.all_bf16()
    assert torch.equal(hif8.bf16_codes(), hif8.encode(values.float()))
    # Large CPU tensors go through the table, small ones through the arithmetic.
    many = values.repeat(2)
    assert torch.equal(hif8.encode(many), hif8.encode(many.float()))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0624, 1.0),
        (1.0625, 1.125),  # halfway between 1 and 1.125
        (-1.0625, -1.125),
        (15.5, 16.0),  # a carry into a binade with fewer bits
        (17.9, 16.0),
        (18.0, 20.0),
        (40959.0, 32768.0),
        (65504.0, 32768.0),
        (float("inf"), 32768.0),
        (float("-inf"), -32768.0),
        (2.0**-22, 2.0**-22),
        (2.0**-23, 2.0**-22),
        (2.0**-23 * 0.999, 0.0),
        (-(2.0**-30), 0.0),
        (1e-45, 0.0),
    ],
)
def test_rounding_is_half_away_from_zero_and_saturates(value: float, rounded: float):
    assert hif8.round_to_hif8(one(value)).item() == rounded
    assert hif8.decode(hif8.encode(one(value)), torch.float32).item() == rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_stays_nan_and_zero_has_one_code(dtype: torch.dtype):
    assert hif8.encode(one(float("nan"), dtype)).item() == hif8.NAN_CODE
    assert hif8.round_to_hif8(one(float("nan"), dtype)).isnan().all()
    assert hif8.encode(one(-0.0, dtype)).item() == 0
    assert not hif8.round_to_hif8(one(-1e-30, torch.float32)).signbit().any()


def test_round_to_hif8_is_decode_of_encode():
    for values in (hif8.all_bf16(), all_fp16()):
        expected = hif8.decode(hif8.encode(values), values.dtype)
        torch.testing.assert_close(
            hif8.round_to_hif8(values), expected, rtol=0, atol=0, equal_nan=True
        )


@given(finite_floats, finite_floats)
def test_rounding_is_monotone(first: float, second: float):
    low, high = hif8.round_to_hif8(torch.tensor(sorted((first, second))))
    assert low <= high


@given(finite_floats)
def test_rounding_is_symmetric_and_idempotent(value: float):
    rounded = hif8.round_to_hif8(one(value))
    assert torch.equal(hif8.round_to_hif8(one(-value)), -rounded + 0.0)
    assert torch.equal(hif8.round_to_hif8(rounded), rounded)


@given(st.floats(1.0, 2.0, width=32), st.integers(-3, 3), st.integers(-3, 3))
def test_inside_the_three_bit_band_rounding_commutes_with_powers_of_two(
    mantissa: float, exponent: int, shift: int
):
    if not -3 <= exponent + shift <= 3:
        shift = -exponent
    x = one(mantissa * 2.0**exponent)
    assert torch.equal(hif8.round_to_hif8(x * 2.0**shift), hif8.round_to_hif8(x) * 2.0**shift)


@given(finite_floats)
def test_rounding_picks_a_nearest_value(value: float):
    grid = hif8.code_values()
    grid = grid[grid.isfinite()].double()
    rounded = hif8.round_to_hif8(one(value)).double()
    smallest_step = 2.0**-22
    if value != 0 and abs(value) < smallest_step:
        assert rounded.abs().item() in (0.0, smallest_step)
    else:
        nearest = (grid - value).abs().min()
        assert (rounded - value).abs() == nearest


def test_shapes_are_kept_also_when_empty_or_strided():
    x = torch.randn(3, 4, 5)
    strided = x.transpose(0, 2)
    assert torch.equal(hif8.encode(strided), hif8.encode(strided.contiguous()))
    assert hif8.encode(torch.empty(0, 7)).shape == (0, 7)
    assert hif8.decode(torch.empty(0, 7, dtype=torch.uint8)).shape == (0, 7)
    assert hif8.encode(torch.tensor(1.0)).shape == ()


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"not torch\.float64: convert first"):
        hif8.encode(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"torch.uint8, not torch.int8"):
        hif8.decode(torch.zeros(2, dtype=torch.int8))
