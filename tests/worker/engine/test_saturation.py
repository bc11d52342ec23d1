"""Test that the sample counts the activations that do not fit the format, in one forward pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.fixtures.fused_transformer import fused_transformer
from quant import Scales, fuse_quantized, quantize_transformer
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales
from quant.numerics import reference
from quant.numerics.hif8 import FLUSHED_BELOW, LARGEST, round_to_hif8
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import scale_policy
from tests.support.diffusers_reference import with_our_products
from worker.engine.saturation import ActSample
from worker.interface import ActShares


def linear(scale: float | None) -> Hif8Linear:
    one = torch.tensor(1.0)
    return Hif8Linear.from_linear(
        nn.Linear(4, 4, bias=False, dtype=torch.bfloat16),
        one,
        act_scale=None if scale is None else torch.tensor(scale),
        act_policy=scale_policy("pow2"),
    )


def test_the_bounds_are_those_of_the_format() -> None:
    below = torch.tensor(FLUSHED_BELOW * (1 - 2**-20))
    assert round_to_hif8(below) == 0
    assert round_to_hif8(torch.tensor(FLUSHED_BELOW)) == 2 * FLUSHED_BELOW
    assert round_to_hif8(torch.tensor(2 * LARGEST)) == LARGEST
    assert round_to_hif8(torch.tensor(LARGEST)) == LARGEST


def test_values_beyond_the_format_and_values_that_become_zero_are_counted() -> None:
    model = nn.Sequential(linear(0.5))
    sample = ActSample(model)
    # Scaled by 1/0.5 the first is beyond the largest value, the second equals it, the third is
    # flushed.
    x = torch.tensor([[LARGEST, LARGEST / 2, FLUSHED_BELOW / 4, 0.0]], dtype=torch.bfloat16)
    sample.arm()
    model(x)
    assert sample.shares() == ActShares(saturated=0.25, flushed=0.25)


def test_a_scale_of_each_token_leaves_nothing_beyond() -> None:
    model = nn.Sequential(linear(None))
    sample = ActSample(model)
    sample.arm()
    model(torch.tensor([[3e8, 1.0, -1.0, 0.0], [1e-8, 1.0, 1.0, 1.0]], dtype=torch.bfloat16))
    shares = sample.shares()
    assert shares is not None
    assert shares.saturated == 0
    # Two values of 1 beside 3e8, and 1e-8 beside 1, are too small for their token's scale.
    assert shares.flushed == 3 / 8


def test_only_the_next_pass_is_counted() -> None:
    model = nn.Sequential(linear(1.0), linear(1.0))
    sample = ActSample(model)
    model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert sample.shares() is None
    sample.arm()
    model(torch.zeros(1, 4, dtype=torch.bfloat16))
    once = sample.shares()
    model(torch.full((1, 4), 1e9, dtype=torch.bfloat16))
    assert sample.shares() == once == ActShares(0.0, 0.0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_pass_that_ends_badly_leaves_no_hooks_once_disarmed() -> None:
    model = nn.Sequential(linear(1.0))
    sample = ActSample(model)
    sample.arm()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3, dtype=torch.bfloat16))
    sample.disarm()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_that_is_not_quantized_has_no_shares() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    sample = ActSample(model)
    sample.arm()
    model(torch.ones(1, 4))
    assert sample.shares() is None


# One of the linears that share an input, because fused kernels round it once for all of them.
ROUNDED_LINEARS = (
    *("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_out.0"),
    *("ffn.net.0.proj", "ffn.net.2"),
)


@pytest.fixture(scope="module")
def transformer(model_folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(
        model_folder / "transformer", dtype=torch.bfloat16
    ).eval()


@pytest.fixture(scope="module")
def misfitting(scales: Scales) -> Scales:
    """Scales with which values saturate in even blocks and are flushed in odd ones."""
    factors = (2.0**-20, 2.0**20)
    act_scale = {
        name: scale * factors[int(name.split(".")[1]) % 2]
        for name, scale in scales.act_scale.items()
    }
    return replace(scales, act_scale=act_scale)


@torch.no_grad()
def one_pass(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out: Tensor = transformer(
        torch.randn(1, 16, 1, 12, 12, generator=generator).to(torch.bfloat16),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, 8, 96, generator=generator).to(torch.bfloat16),
        return_dict=False,
    )[0]
    return out


def counter(total: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Hif8Linear)
        assert module.act_scale is not None
        counts = reference.misfits(args[0], module.act_scale)
        total.append(torch.tensor([*counts.tolist(), args[0].numel()]))

    return count


def test_fused_blocks_count_what_the_layers_would(
    transformer: WanTransformer3DModel, misfitting: Scales
) -> None:
    unfused, _ = quantize_transformer(transformer, misfitting.recipe, misfitting)
    counted: list[Tensor] = []
    for name, module in unfused.named_modules():
        if name.endswith(ROUNDED_LINEARS) and isinstance(module, Hif8Linear):
            module.register_forward_pre_hook(counter(counted))
    out = one_pass(with_our_products(unfused))
    fused = fused_transformer(transformer, EagerKernels(), misfitting.recipe, misfitting)
    sample = ActSample(fused)
    sample.arm()
    assert torch.equal(one_pass(fused), out)
    saturated, flushed, total = torch.stack(counted).sum(0).tolist()
    assert saturated > total / 20
    assert flushed > total / 20
    assert sample.shares() == ActShares(saturated / total, flushed / total)


def test_fused_blocks_have_their_kernels_back_after_the_pass(
    transformer: WanTransformer3DModel, scales: Scales
) -> None:
    kernels = EagerKernels()
    fused = fused_transformer(transformer, kernels, scales.recipe, scales)
    sample = ActSample(fused)
    for _ in range(2):
        sample.arm()
    assert fused.blocks[2].kernels is not kernels
    one_pass(fused)
    assert all(block.kernels is kernels for block in fused.blocks)
    once = sample.shares()
    one_pass(fused)
    assert sample.shares() == once
    sample.arm()
    sample.disarm()
    assert all(block.kernels is kernels for block in fused.blocks)


def test_what_fp8_attention_takes_is_counted(
    transformer: WanTransformer3DModel, scales: Scales
) -> None:
    fit = AttentionScales(1.0, 1.0, 1.0)

    def shares(attention: AttentionScales) -> ActShares:
        quantized, _ = quantize_transformer(transformer, scales.recipe, scales)
        fuse_quantized(quantized, EagerKernels(), {2: attention})
        out = one_pass(quantized)
        sample = ActSample(quantized)
        sample.arm()
        assert torch.equal(one_pass(quantized), out)
        counted = sample.shares()
        assert counted is not None
        return counted

    assert shares(replace(fit, k=2.0**-40)).saturated > shares(fit).saturated
    assert shares(replace(fit, v=2.0**40)).flushed > shares(fit).flushed


def test_fused_bf16_blocks_have_no_shares(transformer: WanTransformer3DModel) -> None:
    kernels = EagerKernels()
    fused = fused_transformer(transformer, kernels)
    sample = ActSample(fused)
    sample.arm()
    assert fused.blocks[2].kernels is kernels
    one_pass(fused)
    assert sample.shares() is None
