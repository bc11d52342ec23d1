"""Rotation by a Hadamard matrix: it keeps scores, and is the matrix that scipy has."""

import pytest
import torch
from scipy.linalg import hadamard

from quant.numerics.hadamard import GROUP, rotate_groups


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_group_is_multiplied_by_the_hadamard_matrix() -> None:
    x = randn(2, 3, 3 * GROUP)
    matrix = torch.from_numpy(hadamard(GROUP)).float() / GROUP**0.5
    expected = (x.unflatten(-1, (-1, GROUP)) @ matrix).flatten(-2)
    assert torch.allclose(rotate_groups(x), expected, atol=1e-6)


def test_scores_do_not_change() -> None:
    q, k = randn(7, 32), randn(9, 32, seed=1)
    assert torch.allclose(rotate_groups(q) @ rotate_groups(k).T, q @ k.T, atol=1e-5)


def test_an_outlier_is_spread_over_its_neighbours() -> None:
    x = torch.zeros(2 * GROUP, dtype=torch.bfloat16)
    x[3] = 8
    rotated = rotate_groups(x)
    assert rotated.dtype == torch.bfloat16
    assert rotated[:GROUP].abs().tolist() == pytest.approx([8 / GROUP**0.5] * GROUP, rel=2**-8)
    assert not rotated[GROUP:].any()


def test_scales_of_unrotated_pairs_do_not_saturate() -> None:
    """They bring pairs below 16. A group of pairs of that length stays far below E4M3's 448."""
    pairs = 16 * torch.ones(GROUP) * 2**-0.5  # all of the largest length, in the same direction
    assert rotate_groups(pairs).abs().amax() == pytest.approx(16 * (GROUP / 2) ** 0.5)
    assert 16 * (GROUP / 2) ** 0.5 < 64
