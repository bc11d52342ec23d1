"""Scale policies: the scaled amax, the power of two with the least error, and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import RecipeError
from quant.numerics import reference, scaling
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import (
    FIRST_BINADE,
    NUM_BINADES,
    POLICIES,
    best_exponent,
    binade_histogram,
    choose_scale,
    is_power_of_two,
    scale_policy,
)

# The `sqnr` policy assumes values uniform within a binade; real values are not quite.
SQNR_SLACK_DB = 0.1


@given(st.floats(2.0**-61, 2.0**68, exclude_max=True, width=32))
def test_pow2_brings_amax_into_8_to_16(amax: float):
    scale = choose_scale(POLICIES["pow2"], torch.tensor(amax)).item()
    assert is_power_of_two(scale)
    assert 8 <= amax / scale < 16


@pytest.mark.parametrize(("name", "qmax"), [("amax15", 15.0), ("amax224", 224.0)])
def test_target_policies_map_amax_to_their_target(name: str, qmax: float):
    amax = torch.tensor([0.3, 7.0, 1000.0])
    torch.testing.assert_close(amax / choose_scale(POLICIES[name], amax), torch.full((3,), qmax))


def test_no_scale_is_one():
    assert torch.equal(choose_scale(POLICIES["none"], torch.tensor([0.1, 99.0])), torch.ones(2))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_nothing_seen_gives_scale_one(policy):
    amax = torch.tensor([0.0, float("inf"), float("nan")])
    scale = choose_scale(policy, amax, torch.zeros(3, NUM_BINADES))
    assert torch.equal(scale, torch.ones(3))


@pytest.mark.parametrize(("amax", "exponent"), [(2.0**-62, -64), (2.0**68, 64), (3e38, 64)])
def test_beyond_them_the_exponent_is_held(amax: float, exponent: int):
    """docs/numerics.md states these bounds."""
    assert choose_scale(POLICIES["pow2"], torch.tensor(amax)).item() == 2.0**exponent


@pytest.mark.parametrize("amax", [1e-38, 3e38])
def test_extreme_magnitudes_keep_scale_and_reciprocal_finite(amax: float):
    scale = choose_scale(POLICIES["pow2"], torch.tensor(amax))
    assert scale > 0
    assert scale.isfinite()
    assert (1 / scale).isfinite()


def test_histogram_counts_by_binade_and_row():
    x = torch.tensor([[1.0, -1.5, 2.0, 0.0], [2.0**-60, 2.0**50, 0.25, float("inf")]])
    counts = binade_histogram(x)
    assert counts.sum(1).tolist() == [3, 3]
    assert counts[0, 0 - FIRST_BINADE] == 2
    assert counts[0, 1 - FIRST_BINADE] == 1
    assert counts[1, 0] == 1  # below the first bin
    assert counts[1, NUM_BINADES - 1] == 1  # above the last
    assert counts[1, -2 - FIRST_BINADE] == 1
    assert torch.equal(binade_histogram(x.to(torch.bfloat16)), counts)


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(200_000, generator=generator)
    outliers = gaussian.clone()
    outliers[:4000] *= 60
    heavy = gaussian / (torch.rand(200_000, generator=generator) + 1e-2)
    return {
        "gaussian": gaussian,
        "outliers": outliers,
        "heavy tails": heavy,
        "tiny": gaussian / 1e6,
    }


@pytest.mark.parametrize("name", distributions())
def test_sqnr_policy_finds_the_best_power_of_two(name: str):
    x = distributions()[name]
    reached = {
        exponent: sqnr_db(x, reference.fake_quantize(x, torch.tensor(2.0**exponent)))
        for exponent in range(-26, 10)
    }
    chosen = int(best_exponent(binade_histogram(x.reshape(1, -1)))[0])
    assert reached[chosen] >= max(reached.values()) - SQNR_SLACK_DB


def test_sqnr_policy_lets_outliers_go_above_16():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(4))
    x[0] = 250.0  # amax at 8..16 would push the rest, which holds more energy, out of 3 bits
    amax, binades = x.abs().amax(), binade_histogram(x.reshape(1, -1))[0]
    by_error = choose_scale(POLICIES["sqnr"], amax, binades)
    by_amax = choose_scale(POLICIES["pow2"], amax)
    assert by_error < by_amax
    assert sqnr_db(x, reference.fake_quantize(x, by_error)) > sqnr_db(
        x, reference.fake_quantize(x, by_amax)
    )


@pytest.mark.parametrize("exponent", [-7, 0, 9])
def test_sqnr_breaks_ties_towards_the_pow2_rule(exponent: int):
    """Values of one binade have the same error anywhere in the 3-bit range."""
    x = 2.0**exponent * (1 + torch.rand(1, 1000))
    binades = binade_histogram(x)
    assert torch.equal(
        choose_scale(POLICIES["sqnr"], x.amax(1), binades),
        choose_scale(POLICIES["pow2"], x.amax(1)),
    )


def test_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="'max' is not one of pow2, sqnr, amax15, amax224, none"):
        scale_policy("max")


def test_sqnr_db_by_hand():
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x + torch.tensor([0.05, 0.0])) == pytest.approx(40.0, abs=1e-4)
    assert sqnr_db(x, x) == math.inf
    with pytest.raises(ValueError, match=r"\[2\] with \[1\]"):
        sqnr_db(x, x[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_one_pass_over_the_bits_gives_the_amax_and_the_binades(dtype, chunk, monkeypatch):
    monkeypatch.setattr(scaling, "_CHUNK", chunk)
    torch.manual_seed(0)
    x = (torch.randn(99) * 2.0 ** torch.randint(-60, 40, (99,))).to(dtype)
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, 2.0**-130], dtype=dtype)])
    for extra in ((), (float("-inf"),), (float("inf"), float("nan"))):
        values = torch.cat([x, torch.tensor(extra, dtype=dtype)])
        amax, exponents = scaling.amax_and_exponents(values)
        torch.testing.assert_close(amax, values.abs().max().float(), rtol=0, atol=0, equal_nan=True)
        expected = scaling.binade_histogram(values.unsqueeze(0))[0]
        assert torch.equal(scaling.fold_exponents(exponents), expected)
        assert exponents.sum() == len(values)
