"""Rounding and decoding without look-ups equal the definitions on every value and every scale."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant.numerics import hif8, hif8_int16, reference
from quant.numerics.scaling import MAX_SCALE_EXPONENT

EXPONENTS = range(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT + 1)
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
NUMBERS = CODES[hif8.code_values().isfinite()]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether numbers have equal bits, and NaNs are in the same places."""
    number = ~expected.isnan()
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    return torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


def test_all_bf16_values_are_rounded_the_same_under_every_scale() -> None:
    x = hif8.all_bf16()
    for exponent in EXPONENTS:
        scale = 2.0**exponent
        expected = reference.fake_quantize(x, torch.tensor(scale))
        assert same_bits(hif8_int16.fake_quantize(x, scale), expected), f"2**{exponent}"


@pytest.mark.parametrize("scale", [0.3, 2.0**-70, 1e-3, 3.0 * 2**20])
def test_other_scales_divide_and_multiply_as_the_definition_does(scale: float) -> None:
    assert hif8_int16.scale_exponent(scale) is None
    x = hif8.all_bf16()
    expected = reference.fake_quantize(x, torch.tensor(scale))
    assert same_bits(hif8_int16.fake_quantize(x, scale), expected)


def test_a_scale_is_shifted_only_if_it_is_a_power_of_two_within_bounds() -> None:
    assert [hif8_int16.scale_exponent(2.0**each) for each in (-64, -1, 0, 1, 64)] == [
        -64,
        -1,
        0,
        1,
        64,
    ]
    assert hif8_int16.scale_exponent(2.0**65) is None
    assert hif8_int16.scale_exponent(2.0**-65) is None
    assert hif8_int16.scale_exponent(1.5) is None


def test_rounding_leaves_its_input_and_keeps_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hif8_int16, "CHUNK", 7)  # pieces that do not fill the tensor
    x = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 100).bfloat16()
    before = x.clone()
    found = hif8_int16.fake_quantize(x, 0.5)
    assert torch.equal(x, before)
    assert torch.equal(found, reference.fake_quantize(x, torch.tensor(0.5)))
    strided = x.transpose(0, 1)
    assert torch.equal(hif8_int16.fake_quantize(strided, 0.5), found.transpose(0, 1))


def test_ranks_order_the_values() -> None:
    ranks = hif8_int16.to_ranks(NUMBERS)
    order = ranks.argsort()
    values = hif8.decode(NUMBERS[order], torch.float32)
    assert ranks[order].tolist() == list(range(-126, 127))
    assert (values.diff() > 0).all()


def test_codes_without_a_number_have_no_rank() -> None:
    others = CODES[~hif8.code_values().isfinite()]
    assert others.tolist() == [0x6F, 0x80, 0xEF]
    assert hif8_int16.to_ranks(others).tolist() == [hif8_int16.NO_RANK] * 3


def test_all_codes_are_decoded_the_same_under_every_scale() -> None:
    ranks = hif8_int16.to_ranks(NUMBERS).unsqueeze(0)
    for exponent in EXPONENTS:
        scale = 2.0**exponent
        expected = reference.dequantize(NUMBERS, torch.tensor(scale))
        found = hif8_int16.dequantize_ranks(ranks, scale)[0]
        assert same_bits(found, expected), f"2**{exponent}"


@pytest.mark.parametrize("scale", [0.3, 2.0**-70, 1.0 + 2.0**-20])
def test_codes_under_other_scales_are_multiplied_as_the_definition_does(scale: float) -> None:
    ranks = hif8_int16.to_ranks(NUMBERS).unsqueeze(0)
    scale = torch.tensor(scale).item()  # as float32 holds it
    expected = reference.dequantize(NUMBERS, torch.tensor(scale))
    assert same_bits(hif8_int16.dequantize_ranks(ranks, scale)[0], expected)


@pytest.mark.parametrize("chunk", [1 << 24, 600])
def test_each_row_has_its_scale(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(hif8_int16, "CHUNK", chunk)
    scales = torch.logspace(-9, 3, 40).unsqueeze(1)  # no powers of two
    qdata = torch.cat([NUMBERS, NUMBERS[:1]]).repeat(40, 1)
    ranks, expected = hif8_int16.to_ranks(qdata), reference.dequantize(qdata, scales)
    assert same_bits(hif8_int16.dequantize_ranks(ranks, scales), expected)
    out = torch.empty(80, qdata.shape[1], dtype=torch.bfloat16)
    hif8_int16.dequantize_ranks(ranks, scales, out[40:])
    assert same_bits(out[40:], expected)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**40, 0.3])
def test_misfits_are_counted_as_the_definition_counts_them(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr(hif8_int16, "CHUNK", 1 << 14)
    x = hif8.all_bf16()
    expected = reference.misfits(x.unsqueeze(0), torch.tensor(scale))
    assert torch.equal(hif8_int16.misfits(x, scale), expected)
    assert (expected > 0).all(), "the values cover both"


class OperationCounter(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0
        self.int16: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not function.is_view and name not in ("empty", "detach"):
            tensors = [each for each in (*args, out) if isinstance(each, Tensor)]
            self.names.append(name)
            self.bytes += sum(each.nbytes for each in tensors)
            if name != "_to_copy" and any(each.dtype is torch.int16 for each in tensors):
                self.int16.add(name)
        return out


VECTOR_INT16 = {"bitwise_and", "bitwise_and_", "bitwise_or", "bitwise_or_"}
"""What CANN's operations do with int16 on a 910B's vector cores; sums, products and clamps not."""


def test_rounding_takes_twenty_operations_of_the_vector_cores() -> None:
    x = hif8.all_bf16()
    with OperationCounter() as counted:
        hif8_int16.fake_quantize(x, 0.5)
    assert (len(counted.names), counted.bytes / x.numel()) == (20, 88)
    assert counted.int16 <= VECTOR_INT16


def test_decoding_takes_seventeen_operations_of_the_vector_cores() -> None:
    ranks = hif8_int16.to_ranks(NUMBERS).repeat(256, 1)
    with OperationCounter() as counted:
        hif8_int16.dequantize_ranks(ranks, 0.5)
    assert (len(counted.names), counted.bytes / ranks.numel()) == (17, 79)
    assert counted.int16 <= VECTOR_INT16
