"""Rotation by a Hadamard matrix: it keeps scores, and is the matrix that scipy has."""

import pytest
import torch
from scipy.linalg import hadamard

from quant.numerics.hadamard import GROUP, rotate_groups


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_group_is_multiplied_by_the_hadamard_matrix() -> None:
    x = randn(2, 3, 40)
    matrix = torch.from_numpy(hadamard(GROUP)).float() / GROUP**0.5
    expected = (x.unflatten(-1, (-1, GROUP)) @ matrix).flatten(-2)
    assert torch.allclose(rotate_groups(x), expected, atol=1e-6)


def test_scores_do_not_change() -> None:
    q, k = randn(7, 32), randn(9, 32, seed=1)
    assert torch.allclose(rotate_groups(q) @ rotate_groups(k).T, q @ k.T, atol=1e-5)


def test_an_outlier_is_spread_over_its_neighbours() -> None:
    x = torch.zeros(16, dtype=torch.bfloat16)
    x[3] = 8
    rotated = rotate_groups(x)
    assert rotated.dtype == torch.bfloat16
    assert rotated[:8].abs().tolist() == pytest.approx([8**0.5] * 8, rel=2**-8)
    assert not rotated[8:].any()


def test_no_value_exceeds_twice_the_largest_pair() -> None:
    """This is why scales that were calibrated for unrotated pairs do not saturate."""
    x = randn(1000, 64)
    pairs = torch.hypot(x[:, 0::2], x[:, 1::2]).amax()
    worst = torch.ones(8) * 2**-0.5  # every pair has the length 1 and points the same way
    assert rotate_groups(x).abs().amax() <= 2 * pairs
    assert rotate_groups(worst).abs().amax() == pytest.approx(2.0)
