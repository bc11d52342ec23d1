"""Hif8Linear: its tensors, its output, and its state dict."""

from typing import Any

import pytest
import torch
from torch import nn

from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import POLICIES, choose_scale

# Rounding Gaussian weights and inputs costs about 31.5 dB each, so about 28.5 dB together.
GAUSSIAN_SQNR_DB = 27.5
POW2 = POLICIES["pow2"]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48).to(torch.bfloat16)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def quantized(linear: nn.Linear, *, act_scale: float | None = 0.5, per_channel: bool = False):
    rows = linear.weight.detach() if per_channel else linear.weight.detach().reshape(1, -1)
    scale = choose_scale(POW2, rows.abs().amax(1))
    return Hif8Linear.from_linear(
        linear,
        scale.unsqueeze(1) if per_channel else scale.squeeze(0),
        act_scale=None if act_scale is None else torch.tensor(act_scale),
        act_policy=POW2,
    )


@pytest.mark.parametrize("act_scale", [0.5, None])
@pytest.mark.parametrize("per_channel", [False, True])
def test_output_is_close_to_the_linear_it_came_from(linear, x, act_scale, per_channel):
    module = quantized(linear, act_scale=act_scale, per_channel=per_channel)
    with torch.no_grad():
        expected, got = linear(x), module(x)
    assert got.dtype is torch.bfloat16
    assert got.shape == (3, 10, 48)
    assert GAUSSIAN_SQNR_DB < sqnr_db(expected, got) < 40  # it did quantize


def test_weights_are_bytes_and_the_bias_is_shared(linear):
    module = quantized(linear)
    assert module.weight_qdata.dtype is torch.uint8
    assert module.weight_qdata.shape == (48, 64)
    assert module.bias is linear.bias
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_state_dict_round_trip_gives_the_same_output(linear, x):
    saved = quantized(linear).state_dict()
    assert set(saved) == {"weight_qdata", "weight_scale", "act_scale", "bias"}
    other = quantized(nn.Linear(64, 48).to(torch.bfloat16), act_scale=4.0)
    other.load_state_dict(saved)
    assert torch.equal(other(x), quantized(linear)(x))


def test_packed_weights_make_the_same_module(linear, x):
    made = quantized(linear)
    packed = Hif8Linear(
        made.weight_qdata, made.weight_scale, act_scale=None, act_policy=POW2, bias=None
    )
    assert set(packed.state_dict()) == {"weight_qdata", "weight_scale"}
    expected = quantized(linear, act_scale=None)
    torch.testing.assert_close(
        packed(x) + linear.bias, expected(x), rtol=2**-7, atol=2**-7
    )  # one BF16 rounding more


def test_moving_to_bf16_keeps_power_of_two_scales_exact(linear, x):
    before = quantized(linear)(x)
    assert torch.equal(quantized(linear).to(torch.bfloat16)(x), before)


def test_float32_inputs_stay_float32(x):
    module = quantized(nn.Linear(64, 48))
    assert module(x.float()).dtype is torch.float32


def test_repr_says_what_it_is(linear):
    assert "act=static (pow2)" in repr(quantized(linear))
    assert "act=per token (pow2)" in repr(quantized(linear, act_scale=None))


def packed(**changes):
    arguments: dict[str, Any] = {
        "weight_qdata": torch.zeros(4, 8, dtype=torch.uint8),
        "weight_scale": torch.tensor(1.0),
        "act_scale": torch.tensor(1.0),
        "act_policy": POW2,
        "bias": None,
    }
    return Hif8Linear(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_qdata": torch.zeros(4, 8)}, TypeError, "not torch.float32"),
        ({"weight_scale": torch.ones(8, 1)}, ValueError, r"\[\] or \[4, 1\], not \[8, 1\]"),
        ({"act_scale": torch.ones(3)}, ValueError, r"act_scale is \[\], not \[3\]"),
        (
            {"act_scale": None, "act_policy": POLICIES["sqnr"]},
            ValueError,
            "sqnr cannot choose scales per token",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        packed(**changes)
