"""INT8 in plain torch, against a reference in numpy that shares nothing with it."""

import numpy as np
import pytest
import torch
from torch import nn

from quant.errors import ConversionError
from quant.numerics import int8
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import POLICIES, choose_scale

BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def numpy_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows as the documentation says it, in float32."""
    amax = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), amax / np.float32(127))
    return np.rint(x / scale).astype(np.int64), scale


def numpy_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    act, act_scale = numpy_quantize(x)
    qdata, weight_scale = numpy_quantize(weight)
    sums = (act @ qdata.T).astype(np.float32)
    return sums * weight_scale.T * act_scale + bias


def test_a_linear_is_what_numpy_makes_of_the_formula() -> None:
    x, linear = randn(9, 2100), nn.Linear(2100, 33).to(BF16)
    x[3] = 0
    x[4, 7] = 3000
    linear.weight.data = randn(33, 2100, seed=1)
    linear.weight.data[5] = 0
    scale = choose_scale(POLICIES["amax127"], linear.weight.detach().abs().amax(1, keepdim=True))
    module = Int8Linear.from_linear(linear, scale)
    with torch.no_grad():
        found = module(x.view(3, 3, 2100))
    arrays = (each.detach().float().numpy() for each in (x, linear.weight, linear.bias))
    expected = torch.from_numpy(numpy_linear(*arrays)).to(BF16)
    assert torch.equal(found.view(9, 33), expected)
    assert torch.equal(found.view(9, 33)[3], linear.bias)  # a token of zeros


def test_ties_go_to_the_even_code_and_large_values_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 128.0, -1e9, 127.4])
    found = int8.quantize(x, torch.tensor(1.0)).tolist()
    assert found == [0, 2, 2, 0, -2, 126, 127, -127, 127]


def test_every_bf16_value_as_the_largest_of_its_token_becomes_127() -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    values = values[values.isfinite() & (values.abs() > 0)]
    qdata, scale = int8.quantize_per_token(values.unsqueeze(1))
    assert torch.equal(qdata.squeeze(1), 127 * values.sign().to(torch.int8))
    assert (scale > 0).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_makes_its_own_output_nan_and_no_other(wrong: float) -> None:
    x, weight = randn(3, 16), randn(8, 16, seed=1)
    x[1, 5] = wrong
    qdata, scale = int8.quantize_per_token(weight)
    out = int8.linear(x, qdata, scale, torch.zeros(8))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_without_a_code_are_refused_by_name(wrong: float) -> None:
    linear = nn.Linear(16, 4).to(BF16)
    linear.weight.data[2, 3] = wrong
    with pytest.raises(ConversionError, match=r"the weights of blocks\.2\.x hold NaN or infinity"):
        Int8Linear.from_linear(linear, torch.ones(4, 1), "blocks.2.x")


def test_products_are_exact_where_float32_alone_would_not_be() -> None:
    act = torch.full((3, 5120), 127, dtype=torch.int8)
    weight = act.clone()
    weight[1] = -127
    weight[2, ::2] = 126
    exact = (act.long() @ weight.long().t()).to(torch.int32)
    assert exact.max() > 2**24
    assert torch.equal(int8.multiply(act, weight), exact)


def test_pieces_of_a_long_input_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(50, 64)
    qdata, scale = int8.quantize_per_token(randn(32, 64, seed=1))
    whole, lost = int8.linear(x, qdata, scale, None), int8.misfits(x)
    monkeypatch.setattr(int8, "_CHUNK", 7 * 64)
    assert torch.equal(int8.linear(x, qdata, scale, None), whole)
    assert torch.equal(int8.misfits(x), lost)


def test_misfits_count_nonzero_values_below_half_a_step() -> None:
    x = torch.tensor([[127.0, 0.4, -0.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert int8.misfits(x).tolist() == [0, 2]


def test_weights_keep_their_values_to_a_byte() -> None:
    linear = nn.Linear(256, 64).to(BF16)
    module = Int8Linear.from_linear(linear, int8.token_scale(linear.weight.detach()))
    assert module.weight_qdata.dtype is torch.int8
    assert set(module.state_dict()) == {"weight_qdata", "weight_scale", "bias"}
    assert module.bias is linear.bias
    assert 40 < sqnr_db(linear.weight.detach(), module.dequantized_weight()) < 55
    assert "act=INT8 per token" in repr(module)


@pytest.mark.parametrize(
    ("qdata", "scale", "error", "message"),
    [
        (torch.uint8, (4, 1), TypeError, r"torch\.int8, not torch\.uint8"),
        (torch.int8, (), ValueError, r"\[4, 1\], not \[\]"),
        (torch.int8, (4,), ValueError, r"\[4, 1\], not \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    qdata: torch.dtype, scale: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Int8Linear(torch.zeros(4, 8, dtype=qdata), torch.ones(scale), bias=None)
