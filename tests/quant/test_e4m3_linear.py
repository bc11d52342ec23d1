"""Weights in E4M3 are those of the linears they are made of; what only a card multiplies is not
tried here."""

import pytest
import torch
from torch import nn

from quant.kernels.cuda import E4m3Linear
from quant.linear import Hif8Linear
from quant.scaling import choose_scale, scale_policy

SCALE = torch.tensor(0.5)


def linear(policy: str, size: float, *, per_channel: bool = False) -> Hif8Linear:
    """A small linear whose weights are as large as `size` says, quantized as `policy` says."""
    generator = torch.Generator().manual_seed(int(size * 8))
    plain = nn.Linear(64, 48, dtype=torch.bfloat16)
    spread = torch.logspace(-3, 3, 48, 2).unsqueeze(1) if per_channel else torch.ones(1)
    weight = size * torch.randn(48, 64, generator=generator) * spread
    plain.weight.data = weight.to(torch.bfloat16)
    amax = plain.weight.detach().abs()
    amax = amax.amax(1, keepdim=True) if per_channel else amax.amax()
    scale = choose_scale(scale_policy(policy), amax)
    return Hif8Linear.from_linear(plain, scale, act_scale=SCALE, act_policy=scale_policy("pow2"))


def weights(of: E4m3Linear) -> torch.Tensor:
    scale = of.weight_scale.t() if of.weight_scale.dim() else of.weight_scale
    return of.weight.float() * scale


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
    # What is not exact is small beside the largest.
    assert (found - expected).abs().max() <= 2**-12 * expected.abs().max()


def test_one_scale_is_kept_where_it_serves_all() -> None:
    assert E4m3Linear([linear("pow2", size) for size in (0.02, 0.3)]).weight_scale.shape == ()
    assert E4m3Linear([linear("amax15", 0.3)]).weight_scale.shape == ()
    two = E4m3Linear([linear("amax15", size) for size in (0.02, 0.3)])
    assert two.weight_scale.shape == (1, 96)


def test_biases_are_joined() -> None:
    parts = [linear("pow2", size) for size in (0.02, 0.3)]
    joined = E4m3Linear(parts)
    assert joined.bias is not None
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    assert torch.equal(joined.bias, torch.cat(biases))
