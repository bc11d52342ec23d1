"""Block-sparse attention: beside a reference on the kept blocks, dense at a share of 1."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.kernels.eager import EagerKernels
from quant.kernels.sparse import blocks
from quant.kernels.sparse.blocks import attend_blocks, choose_blocks, density, sample_mass
from tests.quant.kernels import sparse_reference

BLOCK = 8


def draw(tokens: int, batch: int = 2, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, S, 2, 16] whose softmax is peaked, so that blocks differ."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randn(3, batch, tokens, 2, 16, generator=generator)
    q, k, v = drawn.cumsum(2) / 3
    return q * spread, k * spread, v


@pytest.mark.parametrize("tokens", [32, 45, 5])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_kept_blocks_and_what_they_give_are_the_references(tokens: int, share: float):
    q, k, v = draw(tokens)
    kept = choose_blocks(q, k, BLOCK, share)
    expected = sparse_reference.choose(q, k, BLOCK, share)
    assert np.array_equal(kept.numpy(), expected)
    out, mass = sparse_reference.attend(q, k, v, expected, BLOCK)
    found = attend_blocks(q, k, v, kept, BLOCK)
    np.testing.assert_allclose(found.numpy(), out, rtol=0, atol=1e-5)
    sampled = np.arange(min(tokens, 16)) * tokens // min(tokens, 16)
    assert sample_mass(q, k, kept, BLOCK).item() == pytest.approx(mass[:, sampled].mean(), abs=1e-5)


def test_heads_are_looked_at_some_at_a_time_with_the_same_choice(monkeypatch):
    q, k, _ = draw(64)
    at_once = choose_blocks(q, k, BLOCK, 0.9)
    seen: list[int] = []
    choose = blocks._choose

    def note(queries: Tensor, *others: Any) -> Tensor:
        seen.append(queries.shape[1])
        return choose(queries, *others)

    monkeypatch.setattr(blocks, "MAX_SHARES", 2 * 8**2)
    monkeypatch.setattr(blocks, "_choose", note)
    assert torch.equal(choose_blocks(q, k, BLOCK, 0.9), at_once)
    assert seen == [1, 1]


def test_a_smaller_share_keeps_fewer_blocks_of_every_head():
    q, k, _ = draw(64)
    few, many = (choose_blocks(q, k, BLOCK, share) for share in (0.5, 0.9))
    assert few.any(-1).all()
    assert (few <= many).all()
    assert few.sum() < many.sum() < many.numel()
    assert not torch.equal(few[:, 0], few[:, 1])


def test_all_blocks_are_dense_attention():
    q, k, v = (x.bfloat16() for x in draw(45))
    # So far apart that the least shares round to nothing.
    kept = choose_blocks(q * 50, k, BLOCK, 1.0)
    assert kept.all()
    assert density(kept, 45, BLOCK).item() == pytest.approx(1)
    assert sample_mass(q, k, kept, BLOCK).item() == pytest.approx(1)
    dense = EagerKernels().attention(q, k, v, None, None)
    torch.testing.assert_close(attend_blocks(q, k, v, kept, BLOCK).flatten(2), dense)


def test_the_density_counts_scores_not_blocks():
    kept = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    kept[..., 0, 1] = kept[..., 1, 1] = True
    # Ten tokens: blocks of eight and of two, so that 8 x 2 and 2 x 2 of 100 scores are kept.
    assert density(kept, 10, BLOCK).item() == pytest.approx(0.2)


def test_queries_are_processed_in_chunks_of_the_same_result():
    q, k, v = draw(45)
    kept = choose_blocks(q, k, BLOCK, 0.6)
    whole, chunked = (attend_blocks(q, k, v, kept, BLOCK, each) for each in (1 << 20, 1500))
    torch.testing.assert_close(chunked, whole)
