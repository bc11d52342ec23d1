"""Weights in E4M3 equal those of the quantized linears; products need a GPU and are not tested."""

import pytest
import torch
from torch import nn

from quant.kernels import triton_recode
from quant.kernels.cuda import E4m3Linear
from quant.numerics import hif8
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import choose_scale, scale_policy

SCALE = torch.tensor(0.5)


def linear(policy: str, size: float, *, per_channel: bool = False) -> Hif8Linear:
    """Return a small linear with weights of magnitude `size`, quantized by `policy`."""
    generator = torch.Generator().manual_seed(int(size * 8))
    plain = nn.Linear(64, 48, dtype=torch.bfloat16)
    spread = torch.logspace(-3, 3, 48, 2).unsqueeze(1) if per_channel else torch.ones(1)
    weight = size * torch.randn(48, 64, generator=generator) * spread
    plain.weight.data = weight.to(torch.bfloat16)
    amax = plain.weight.detach().abs()
    amax = amax.amax(1, keepdim=True) if per_channel else amax.amax()
    scale = choose_scale(scale_policy(policy), amax)
    return Hif8Linear.from_linear(plain, scale, act_scale=SCALE, act_policy=scale_policy("pow2"))


def weights(linear: E4m3Linear) -> torch.Tensor:
    scale = linear.weight_scale.t() if linear.weight_scale.dim() else linear.weight_scale
    return linear.weight.float() * scale


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("policy", ["pow2", "amax15", "amax224"])
def test_the_weights_stay_what_they_were(policy: str, per_channel: bool) -> None:
    parts = [linear(policy, size, per_channel=per_channel) for size in (0.02, 0.3, 1.7)]
    joined = E4m3Linear(parts)
    expected = torch.cat([part.dequantized_weight(torch.float32) for part in parts])
    found = weights(joined)
    exact = torch.isclose(found, expected, rtol=1e-6, atol=0)
    assert exact.float().mean() > 0.99
    assert joined.flushed == pytest.approx(1 - exact.float().mean().item(), abs=2e-3)
    # Inexact weights are small compared with the largest.
    assert (found - expected).abs().max() <= 2**-12 * expected.abs().max()


@pytest.mark.parametrize("factor", [1.0, 0.25, 64.0, 0.3])
def test_every_code_becomes_the_nearest_of_e4m3(factor: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(40)  # more than one program
    out = torch.empty(codes.shape, dtype=torch.float8_e4m3fn)
    inexact_count = torch.zeros(1, dtype=torch.int32)
    triton_recode.to_e4m3(codes, factor, out, inexact_count)
    found = out.float().view(40, 256)
    all_e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    all_e4m3 = all_e4m3[all_e4m3.isfinite()]
    values = hif8.code_values() * factor
    number = ~values.isnan()
    assert torch.equal(found.isnan(), (~number).expand(40, -1))
    found, values = found[:, number], values[number].clamp(-448, 448)
    nearest = (all_e4m3[None] - values[:, None]).abs().amin(1)
    assert torch.equal((found - values).abs(), nearest.expand(40, -1))
    inexact = (nearest > 0) | (hif8.code_values()[number].abs() * factor > 448)
    assert inexact_count.item() == 40 * (inexact.sum() + (~number).sum())


def test_the_largest_magnitude_is_found_whatever_its_sign() -> None:
    finite = hif8.code_values().abs().nan_to_num(0, 0)
    order = finite.argsort()
    parts = [order[:size].to(torch.uint8).repeat(50) for size in (1, 77, 200, 256)]
    expected = [finite[part.long()].max().item() for part in parts]
    assert [
        triton_recode.magnitude(rank) for rank in triton_recode.largest_ranks(parts).tolist()
    ] == expected


def test_one_scale_is_used_where_it_is_exact_for_all() -> None:
    assert E4m3Linear([linear("pow2", size) for size in (0.02, 0.3)]).weight_scale.shape == ()
    assert E4m3Linear([linear("amax15", 0.3)]).weight_scale.shape == ()
    two = E4m3Linear([linear("amax15", size) for size in (0.02, 0.3)])
    assert two.weight_scale.shape == (1, 96)


def test_linears_whose_weights_are_all_zero() -> None:
    zeros = linear("pow2", 0.3)
    zeros.weight_qdata.zero_()
    alone = E4m3Linear([zeros])
    assert not weights(alone).any()
    assert alone.flushed == 0
    other = linear("pow2", 0.3)
    joined = weights(E4m3Linear([zeros, other]))
    assert not joined[:48].any()
    assert torch.allclose(joined[48:], other.dequantized_weight(torch.float32), atol=2**-12)


def test_biases_are_joined() -> None:
    parts = [linear("pow2", size) for size in (0.02, 0.3)]
    joined = E4m3Linear(parts)
    assert joined.bias is not None
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    assert torch.equal(joined.bias, torch.cat(biases))


@pytest.mark.parametrize("policy", ["pow2", "amax15"])
def test_linears_of_one_input_take_the_scale_that_saturates_for_none(policy: str) -> None:
    parts = [linear(policy, size) for size in (0.02, 0.3, 1.7)]
    for part, scale in zip(parts, (0.5, 2.0, 0.25), strict=True):
        part.act_scale = torch.tensor(scale)
    joined = E4m3Linear(parts)
    assert joined.act_scale == 2.0
    assert joined.input_scale == 2.0
