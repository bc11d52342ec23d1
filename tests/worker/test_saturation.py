"""The sample of activations counts what the format cannot hold, in one forward pass."""

import pytest
import torch
from torch import nn

from quant.hif8 import FLUSHED_BELOW, LARGEST, round_to_hif8
from quant.linear import Hif8Linear
from quant.scaling import scale_policy
from worker.saturation import ActSample, ActShares


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
    # Scaled by 1/0.5 the first is beyond the largest value, the second is it, the third vanishes.
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
