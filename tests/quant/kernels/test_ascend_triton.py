"""The Triton kernels for Ascend compute the same as plain torch, run by Triton's interpreter."""

import itertools

import numpy as np
import pytest
import torch
import triton.runtime.interpreter
from torch import Tensor

from quant.kernels.ascend_triton import AscendTritonKernels
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels, Norm
from quant.numerics import hif8, hif8_int16, reference
from quant.transformer.module_tree import share_tree
from quant.transformer.wan_block import fuse_blocks
from tests.quant.kernels import npu_operations
from tests.quant.kernels.test_ascend_kernels import draw, transformer

# The interpreter uses numpy, which warns of the NaN and infinities that these tests use.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

EAGER = EagerKernels()
TRITON = AscendTritonKernels(programs=3)
SHAPES = ((2, 2, 96), (1, 3, 128), (1, 3, 5120))
"""Batch, tokens, width: one with a part beyond the width, a power of two, and the 14B's."""

SCALES = (1.0, 2.0**-5, 2.0**13, 2.0**64, 2.0**-64, 0.3, 3e-5)

GELU_NEAR_ZERO = 2.0**-20
"""Below it, torch's tanh form has lost its digits: 1 + tanh(x) is a difference of nearly equal
numbers. The kernel's form has none."""


@pytest.fixture(autouse=True)
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter convert BF16 as chips do; its own code truncates."""
    convert = triton.runtime.interpreter._convert_float

    def convert_float(x, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        if (source.name, target.name) == ("bf16", "fp32"):
            widened = torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
            return widened.float().numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", convert_float)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Compare bit for bit, apart from which of BF16's NaN a NaN is."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("scale", SCALES)
def test_every_bf16_value_is_rounded_as_by_the_reference(scale: float) -> None:
    x = hif8.all_bf16()
    expected = reference.fake_quantize(x, torch.tensor(scale))
    assert_same_bits(TRITON.round_act(x, scale), expected)


def test_nothing_is_rounded_without_a_scale() -> None:
    x = hif8.all_bf16()
    assert TRITON.round_act(x, None) is x


@pytest.mark.parametrize("scale", [None, 2.0**-6, 0.25, 0.3])
def test_gelu_of_every_bf16_value(scale: float | None) -> None:
    x = hif8.all_bf16()
    found, expected = TRITON.gelu(x, scale), EAGER.gelu(x, scale)
    near_zero = expected.abs() < GELU_NEAR_ZERO if scale else expected.abs() < 2.0**-8
    assert_same_bits(found[~near_zero], expected[~near_zero])
    differ = found[near_zero] != expected[near_zero]
    assert differ.sum() < 200
    assert (found[near_zero] - expected[near_zero]).abs().max() <= 2.0**-16


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**40, 2.0**-64, 0.3, "by row"])
def test_every_code_is_decoded_as_by_the_reference(scale: float | str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    ranks = hif8_int16.to_ranks(codes)
    has_value = ranks != hif8_int16.NO_RANK
    assert has_value.sum() == 253
    codes, ranks = codes[has_value].view(11, 23), ranks[has_value].view(11, 23)
    scales = (0.01 + torch.arange(11) / 3).unsqueeze(1) if isinstance(scale, str) else scale
    expected = reference.dequantize(codes, torch.as_tensor(scales))
    assert_same_bits(TRITON.decode(ranks, scales), expected)
    out = torch.empty(11, 23, dtype=torch.bfloat16)
    assert TRITON.decode(ranks, scales, out) is out
    assert_same_bits(out, expected)


def test_rows_longer_than_a_block_are_decoded_under_their_own_scales() -> None:
    ranks = torch.randint(-126, 127, (5, 5120), dtype=torch.int8)
    scales = randn(5, 1, seed=0).abs()
    expected = hif8_int16.dequantize_ranks(ranks, scales)
    assert_same_bits(TRITON.decode(ranks, scales), expected)


@pytest.mark.parametrize("act_scale", [None, 0.25, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_norm(shape: tuple[int, int, int], act_scale: float | None) -> None:
    batch, _, width = shape
    x, delta = (randn(*shape, seed=seed).to(torch.bfloat16) for seed in (0, 1))
    factor, shift, gate = (randn(batch, width, seed=seed) for seed in (2, 3, 4))
    modulated = Norm(factor, shift, 1e-6, plus_one=True)
    affine = Norm(factor[:1], shift[:1], 1e-6, plus_one=False)
    for norm, (delta_, gate_) in itertools.product(
        (modulated, affine), ((None, None), (delta, gate), (delta, None))
    ):
        total, normed = TRITON.add_norm(x, delta_, gate_, norm, act_scale)
        expected_total, expected = EAGER.add_norm(x, delta_, gate_, norm, act_scale)
        assert_same_bits(total, expected_total)
        # The mean is summed in another order, so that one value in thousands rounds differently.
        assert (normed != expected).float().mean() < 1e-3
        assert torch.allclose(normed.float(), expected.float(), rtol=2.0**-3, atol=2.0**-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_sum(shape: tuple[int, int, int]) -> None:
    x, delta = (randn(*shape, seed=seed).to(torch.bfloat16) for seed in (0, 1))
    gate = randn(shape[0], shape[2], seed=2)
    for each in (gate, gate[:1], None):
        if each is None or each.shape[0] == shape[0]:
            assert_same_bits(TRITON.add_gated(x, delta, each), EAGER.add_gated(x, delta, each))


def test_one_row_of_factors_serves_a_whole_batch() -> None:
    x = randn(2, 3, 96, seed=0).to(torch.bfloat16)
    gate = randn(1, 96, seed=1)
    assert_same_bits(TRITON.add_gated(x, x, gate), EAGER.add_gated(x, x, gate))


def test_a_bf16_and_a_quantized_block_equal_plain_torch_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    npu_operations.install(monkeypatch)

    def run(kernels: Kernels) -> Tensor:
        fused = share_tree(transformer(), lambda name, module: None)
        assert fuse_blocks(fused, kernels) == ()
        given = draw(0, 1, 16, 1, 4, 4), torch.tensor([500.0]), draw(1, 1, 7, 32)
        with torch.no_grad():
            out: Tensor = fused(*given, return_dict=False)[0]
        return out

    assert torch.equal(run(TRITON), run(EAGER))
