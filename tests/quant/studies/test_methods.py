"""Test number formats, operands, rounding and transforms against independent references."""

import en_dtypes
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn
from torch.nn import functional

from quant.errors import StudyError
from quant.numerics.scaling import NUM_BINADES, binade_histogram, scale_policy
from quant.studies.methods.attention import RoundedAttention
from quant.studies.methods.formats import BF16, E4M3, E5M2, HIF4, HIF8, INT4, INT8, Format
from quant.studies.methods.method import (
    InputStatistics,
    Method,
    PreparedLinear,
    input_reads,
    weight_bytes,
)
from quant.studies.methods.operand import (
    Operand,
    PerGroup,
    PerRow,
    PerStepGroup,
    PerTensor,
    step_group,
)
from quant.studies.methods.registry import METHODS, chosen_methods
from quant.studies.methods.rounding import Gptq, Nearest
from quant.studies.methods.transforms import OutlierColumns, SmoothQuant


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(64, 96) * torch.exp(3 * draw(64, 96, seed=1))
SCALE = torch.tensor(0.5)


def test_hif8_is_that_of_en_dtypes() -> None:
    small = X.clamp(-2000, 2000)
    expected = (small / SCALE).numpy().astype(en_dtypes.hifloat8).astype(np.float32)
    assert torch.equal(HIF8.fake_quantize(small, SCALE), torch.from_numpy(expected) * SCALE)


@pytest.mark.parametrize(
    ("number_format", "dtype", "largest"),
    [(E4M3, torch.float8_e4m3fn, 448.0), (E5M2, torch.float8_e5m2, 57344.0)],
)
def test_float8_is_torch_s_and_saturates(
    number_format: Format, dtype: torch.dtype, largest: float
) -> None:
    fitting = X.clamp(-largest / 4, largest / 4)
    expected = (fitting / SCALE).to(dtype).float() * SCALE
    assert torch.equal(number_format.fake_quantize(fitting, SCALE), expected)
    huge = torch.tensor([1e6, -1e6])
    assert number_format.fake_quantize(huge, SCALE).tolist() == [largest / 2, -largest / 2]


@pytest.mark.parametrize(("number_format", "largest"), [(INT8, 127), (INT4, 7)])
def test_integers_are_numpy_s(number_format: Format, largest: int) -> None:
    expected = np.clip(np.rint(X.numpy() / 0.5), -largest, largest) * np.float32(0.5)
    assert np.array_equal(number_format.fake_quantize(X, SCALE).numpy(), expected)


def test_bf16_is_torch_s() -> None:
    assert torch.equal(BF16.fake_quantize(X, SCALE), X.bfloat16().float())


def hif4_by_hand(group: np.ndarray) -> np.ndarray:
    """Round one group of 64 by loops, with the elements of en_dtypes' 1-2 format."""
    grid = np.array([each * 0.25 for each in range(8)])
    assert set(grid) == {float(abs(each)) for each in np.arange(16, dtype=np.uint8).view(
        en_dtypes.float4_e1m2).astype(np.float32)}  # fmt: skip
    exponent = np.floor(np.log2(abs(group).max() / 7))
    shared = np.round(abs(group).max() / 7 / 2**exponent * 4) / 4 * 2**exponent
    out = np.zeros(64)
    for first in range(0, 64, 4):
        eight = group[first // 8 * 8 : first // 8 * 8 + 8]
        four = group[first : first + 4]
        local = shared * (2 if abs(eight).max() >= 4 * shared else 1)
        local *= 2 if abs(four).max() >= 2 * local else 1
        for place, value in enumerate(four):
            nearest = grid[np.abs(grid - abs(value) / local).argmin()]
            out[first + place] = np.sign(value) * nearest * local
    return out


def test_hif4_is_the_grid_that_its_docstring_says() -> None:
    x = X[:8, :64]
    expected = np.stack([hif4_by_hand(row) for row in x.double().numpy()])
    found = HIF4.fake_quantize(x, torch.tensor(1.0)).double().numpy()
    assert np.allclose(found, expected, rtol=1e-6)
    assert HIF4.fake_quantize(torch.zeros(3, 70), torch.tensor(1.0)).abs().sum() == 0
    short = HIF4.fake_quantize(X[:, :70], torch.tensor(1.0))
    assert torch.equal(short[:, :64], HIF4.fake_quantize(X[:, :64], torch.tensor(1.0)))


def test_groups_have_scales_of_their_own() -> None:
    operand = Operand(INT8, PerGroup(32))
    expected = torch.cat(
        [Operand(INT8, PerRow()).round(part) for part in X[:, :70].split(32, dim=1)], 1
    )
    assert torch.equal(operand.round(X[:, :70]), expected)


def test_a_rule_for_scales_replaces_the_format_s() -> None:
    operand = Operand(HIF8, PerTensor(), scale_policy("amax15"))
    assert operand.scale_of(X).item() == pytest.approx(X.abs().max().item() / 15)
    rows = Operand(HIF8, PerRow(), scale_policy("sqnr")).scale_of(X)
    assert rows.shape == (64, 1)
    alone = Operand(HIF8, PerTensor(), scale_policy("sqnr")).scale_of(X[3:4])
    assert rows[3].item() == alone.item()


def test_steps_are_grouped_in_order() -> None:
    recorded = (2, 7, 12, 17, 22, 27, 32, 37)
    assert [step_group(step, recorded, 4) for step in recorded] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert step_group(0, recorded, 4) == 0
    assert step_group(49, recorded, 4) == 3
    assert [step_group(step, (1, 3), 4) for step in (0, 1, 3, 4)] == [0, 0, 1, 1]


def correlated_inputs() -> torch.Tensor:
    return draw(512, 8) @ draw(8, 64, seed=1) + 0.1 * draw(512, 64, seed=2)


@pytest.mark.parametrize("name", ["int8-gptq", "hif8-gptq"])
def test_gptq_beats_nearest_on_correlated_inputs(name: str) -> None:
    x, weight, operand = correlated_inputs(), draw(32, 64, seed=3), METHODS[name].weight
    errors = []
    for rounding in (Nearest(), Gptq()):
        rounded = rounding.round(weight, operand, x.T @ x)
        scale = operand.scale_of(weight)
        assert torch.allclose(operand.round(rounded, scale), rounded, atol=1e-6), "on the grid"
        errors.append((x @ (rounded - weight).T).square().sum().item())
    assert errors[1] < 0.7 * errors[0]


def test_gptq_takes_channels_that_are_always_zero() -> None:
    x, weight = correlated_inputs(), draw(32, 64, seed=3)
    x[:, 5] = 0
    rounded = Gptq().round(weight, Operand(INT8, PerRow()), x.T @ x)
    assert rounded.isfinite().all()
    assert rounded[:, 5].abs().sum() == 0


def test_gptq_refuses_inputs_that_are_not_finite() -> None:
    with pytest.raises(StudyError, match="cannot factorize"):
        Gptq().round(draw(4, 4), Operand(INT8, PerRow()), torch.diag(torch.tensor([1.0, -9, 1, 1])))


def statistics(x: torch.Tensor) -> InputStatistics:
    binades = binade_histogram(x.reshape(1, -1))
    return InputStatistics(x.abs().amax((0, 1)), x.abs().amax().reshape(1), binades)


def test_smoothquant_computes_the_same_function() -> None:
    x, linear = draw(2, 40, 64), nn.Linear(64, 32)
    x[..., 3] *= 50
    exact = Operand(BF16, PerTensor())
    for alpha in (0.0, 0.5, 1.0):
        smooth = SmoothQuant(alpha)
        divisors = smooth.divisors(linear.weight, statistics(x).channels)
        assert divisors is not None
        moved = functional.linear(x / divisors, linear.weight * divisors, linear.bias)
        torch.testing.assert_close(moved, linear(x), rtol=1e-4, atol=1e-4)
        Method("", "", "", exact, exact, transform=smooth)
    equal = SmoothQuant(1.0).divisors(linear.weight, statistics(x).channels)
    assert equal is not None
    torch.testing.assert_close((x / equal).abs().amax((0, 1)), torch.ones(64))


def error_of(name: str, x: torch.Tensor, linear: nn.Linear) -> float:
    prepared = PreparedLinear.of(METHODS[name], linear, statistics(x)).at((1, 1), (1,))
    return float((prepared(x) - linear(x)).detach().square().mean())


def test_smoothquant_helps_static_int8_where_a_channel_is_large() -> None:
    x, linear = draw(2, 40, 64), nn.Linear(64, 32)
    x[..., 3] *= 50
    assert error_of("int8-smooth", x, linear) < 0.3 * error_of("int8-static", x, linear)
    assert error_of("int8-outliers", x, linear) < 0.3 * error_of("int8-per-token", x, linear)


def test_outlier_columns_from_zero_on_are_exact() -> None:
    x, linear = draw(2, 40, 64).bfloat16().float(), nn.Linear(64, 32)
    low = Operand(INT4, PerRow())
    method = Method("", "", "", low, low, transform=OutlierColumns(0.0))
    prepared = PreparedLinear.of(method, linear, statistics(x)).at((1, 1), (1,))
    torch.testing.assert_close(prepared(x), linear(x))
    alone = PreparedLinear.of(METHODS["int8-outliers"], linear, statistics(x)).at((1,), (1,))
    x[1, :, 4] = 9
    assert torch.allclose(alone(x)[:1], alone(x[:1])), "each sample has its own outliers"


def test_static_scales_of_steps_fit_each_sample() -> None:
    early, late = draw(1, 40, 64), 100 * draw(1, 40, 64, seed=1)
    x = torch.cat((early, late))
    seen = InputStatistics(
        x.abs().amax((0, 1)),
        torch.stack((early.abs().max(), late.abs().max())),
        torch.zeros(2, NUM_BINADES),
    )
    linear = nn.Linear(64, 32)
    act = Operand(INT8, PerStepGroup())
    weight = Operand(BF16, PerTensor())
    by_step = PreparedLinear.of(Method("", "", "", weight, act), linear, seen).at((1, 9), (1, 9))
    expected = functional.linear(
        torch.cat([Operand(INT8, PerTensor()).round(each) for each in (early, late)]),
        linear.weight.bfloat16().float(),
        linear.bias,
    )
    torch.testing.assert_close(by_step(x), expected)


def test_fewer_bits_and_coarser_scales_lose_more() -> None:
    x, linear = draw(2, 40, 64) * torch.exp(draw(2, 40, 1, seed=4)), nn.Linear(64, 32)
    errors = {name: error_of(name, x, linear) for name in METHODS if "gptq" not in name}
    assert errors["bf16"] < errors["int8-per-token"] < errors["int8-static"]
    assert errors["int8-per-token"] < errors["hif8"] < errors["int4-per-token"]
    assert errors["e4m3"] < errors["e5m2"] < errors["int4-per-token"]
    assert errors["int8-groups"] <= errors["int8-per-token"]
    assert errors["hif8"] < errors["hif4"] < errors["int4-per-token"]


@pytest.mark.parametrize(("number_format", "bound"), [(BF16, 0.01), (HIF8, 0.1), (E4M3, 0.1)])
def test_attention_is_wan_s_but_for_the_rounding(number_format: Format, bound: float) -> None:
    torch.manual_seed(0)
    attention = WanAttention(32, heads=2, dim_head=16, processor=WanAttnProcessor())
    x, angles = draw(2, 24, 32), draw(1, 24, 1, 8)
    turn = (angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1))
    with torch.no_grad():
        exact = attention.processor(attention, x, None, None, turn)
        rounded = RoundedAttention(number_format)(attention, x, None, None, turn)
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < bound


def test_costs() -> None:
    shape = [(100, 256)]
    size = 100 * 256
    assert weight_bytes(METHODS["bf16"], shape) == 2 * size
    assert weight_bytes(METHODS["hif8"], shape) == size + 2
    assert weight_bytes(METHODS["int8-static"], shape) == size + 2 * 100
    assert weight_bytes(METHODS["int4-groups"], shape) == size // 2 + 2 * 200
    assert weight_bytes(METHODS["hif4"], shape) == size * 9 // 16
    assert weight_bytes(METHODS["int8-outliers"], shape) == 3 * size + 2 * 100
    reads = [
        input_reads(METHODS[name]) for name in ("hif8", "hif4", "int8-groups", "int8-outliers")
    ]
    assert reads == [1, 2, 2, 3]
    assert METHODS["hif8"].is_calibrated
    assert not METHODS["int8-per-token"].is_calibrated
    assert not METHODS["hif4"].is_calibrated


def test_methods_are_chosen_by_name() -> None:
    assert [each.name for each in chosen_methods("int8-static, e4m3")] == [
        "hif8", "int8-static", "e4m3",
    ]  # fmt: skip
    assert chosen_methods("all") == tuple(METHODS.values())
    assert all(name == each.name for name, each in METHODS.items())
    with pytest.raises(StudyError, match="'int9' is not one of all, bf16, hif8"):
        chosen_methods("hif8,int9")
