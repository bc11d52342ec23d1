"""The Triton kernels compute the same as plain torch, run by Triton's interpreter on the CPU.

On a GPU, `quant.kernels.self_test.check_kernels` tests the compiled kernels."""

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales, Norm
from quant.kernels.self_test import SMALL, BlockShape, _OperationsTest
from quant.numerics import hif8
from quant.numerics.hadamard import GROUP
from quant.numerics.metrics import sqnr_db

# The interpreter uses numpy, which warns of the NaN and infinities that these tests use.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

EAGER = EagerKernels()
SHAPES = ((2, 5, 96, 4), (1, 3, 384, 3), (1, 2, 5120, 40))  # batch, tokens, width, heads
SCALE = 0.25
SCALES = AttentionScales(0.25, 0.5, 0.125)
AGREEMENT_DB = 20.0
"""Lowest SQNR of a kernel against plain torch, in dB.

The interpreter truncates where a GPU rounds, so the last bit may differ everywhere. A wrong result
is below 10."""


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    return importlib.import_module("quant.kernels.triton_fused")


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def values(code: Tensor, scale: float | None) -> Tensor:
    return code.float() * (1.0 if scale is None else scale)


def test_every_bf16_value_is_rounded_to_hifloat8_as_far_as_e4m3_reaches(fused: ModuleType) -> None:
    x = hif8.all_bf16()
    x = x[x.abs() <= 384]  # larger values saturate on a GPU, but not in the interpreter
    found = fused.round_act(x, 1.0).float()
    expected = hif8.round_to_hif8(x).float()
    exact = expected.abs() >= 2**-8
    assert exact.sum() > 4000
    assert torch.equal(found[exact], expected[exact])
    assert (found[~exact] - expected[~exact]).abs().max() < 2**-9


@pytest.mark.parametrize("fp8_attention", [False, True])
@pytest.mark.parametrize("act_scale", [None, SCALE])
@pytest.mark.parametrize(
    "shape", [SMALL, BlockShape(40, 5120, 13824), BlockShape(4, 128, 344)], ids=str
)
def test_the_self_test_of_a_start_passes(
    fused: ModuleType, shape: BlockShape, act_scale: float | None, fp8_attention: bool
) -> None:
    """The part written in Triton, at the widths of the 14B and of the miniature."""
    from quant.kernels.cuda import CudaKernels  # noqa: PLC0415 (imports Triton)

    with torch.no_grad():
        test = _OperationsTest(torch.device("cpu"), shape, 3, act_scale, fp8_attention)
        expected, found = test.run(EAGER), test.run(CudaKernels())
    assert expected.keys() == found.keys()
    for name, values_ in found.items():
        assert sqnr_db(expected[name], values_) > AGREEMENT_DB, name


@pytest.mark.parametrize("act_scale", [None, SCALE])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_norm(
    fused: ModuleType, shape: tuple[int, int, int, int], act_scale: float | None
) -> None:
    batch, tokens, width, _ = shape
    x, delta = randn(batch, tokens, width), randn(batch, tokens, width, seed=1)
    factor, shift, gate = (randn(batch, width, seed=seed).float() for seed in (2, 3, 4))
    for norm, delta_, gate_ in (
        (Norm(factor, shift, 1e-6, plus_one=True), None, None),
        (Norm(factor, shift, 1e-6, plus_one=True), delta, gate),
        (Norm(factor[:1], shift[:1], 1e-6, plus_one=False), delta, None),
    ):
        total, normed = fused.add_norm(x, delta_, gate_, norm, act_scale)
        expected_total, expected = EAGER.add_norm(x, delta_, gate_, norm, act_scale)
        assert sqnr_db(expected_total, total) > AGREEMENT_DB
        assert sqnr_db(expected, values(normed, act_scale)) > AGREEMENT_DB


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_sum(fused: ModuleType, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, width, _ = shape
    x, delta = randn(batch, tokens, width), randn(batch, tokens, width, seed=1)
    gate = randn(batch, width, seed=2).float()
    for each in (gate, None):
        assert (
            sqnr_db(EAGER.add_gated(x, delta, each), fused.add_gated(x, delta, each)) > AGREEMENT_DB
        )


@pytest.mark.parametrize("act_scale", [None, SCALE])
def test_gelu(fused: ModuleType, act_scale: float | None) -> None:
    x = torch.cat([3 * randn(4000), torch.tensor([0.0, 30.0, -30.0], dtype=torch.bfloat16)])
    found = values(fused.gelu(x, act_scale), act_scale)
    assert sqnr_db(EAGER.gelu(x, act_scale), found) > AGREEMENT_DB


@pytest.mark.parametrize("scales", [None, SCALES, replace(SCALES, rotate=False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_and_keys_are_normalised_and_rotated(
    fused: ModuleType, shape: tuple[int, int, int, int], scales: AttentionScales | None
) -> None:
    batch, tokens, width, heads = shape
    if scales is not None and width // heads % GROUP:
        scales = replace(scales, rotate=False)  # a group must not reach into the next head
    q_norm, k_norm = (nn.RMSNorm(width, eps=1e-6, dtype=torch.bfloat16) for _ in range(2))
    for norm in (q_norm, k_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    angles = randn(1, tokens, 1, width // heads // 2).float()
    cos, sin = (function(angles).repeat_interleave(2, -1) for function in (torch.cos, torch.sin))
    qkv = randn(batch, tokens, 3 * width)
    with torch.no_grad():
        found = fused.norm_rope(qkv, q_norm, k_norm, (cos, sin), heads, scales)
        expected = EAGER.norm_rope(qkv, q_norm, k_norm, (cos, sin), heads, scales)
    each_scale = (None,) * 3 if scales is None else (scales.q, scales.k, scales.v)
    for ours, theirs, scale in zip(found, expected, each_scale, strict=True):
        assert ours.shape == theirs.shape
        assert sqnr_db(theirs, values(ours, scale)) > AGREEMENT_DB


def test_queries_alone_are_only_normalised(fused: ModuleType) -> None:
    norm = nn.RMSNorm(256, eps=1e-6, dtype=torch.bfloat16)
    x = randn(1, 7, 256)
    with torch.no_grad():
        (found,) = fused.norm_rope(x, norm, None, None, 2, None)
        (expected,) = EAGER.norm_rope(x, norm, None, None, 2, None)
    assert found.shape == (1, 7, 2, 128)
    assert sqnr_db(expected, found) > AGREEMENT_DB
