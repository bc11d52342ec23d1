"""The Triton kernel for sparse attention computes what is emulated, in Triton's interpreter.

They run in float32, because the interpreter multiplies no BF16. On a GPU,
`quant.kernels.self_test.check_sparse` and `test_on_cuda.py` test the compiled kernel."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.errors import ConversionError
from quant.kernels import selection
from quant.kernels.eager import EagerKernels
from quant.kernels.selection import pick_kernels
from quant.kernels.self_test import BlockShape, check_sparse
from quant.kernels.sparse.blocks import attend_blocks, choose_blocks
from quant.numerics.metrics import sqnr_db

# The interpreter uses numpy, which warns of the infinities that masked scores are.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

AGREEMENT_DB = 100.0
"""Lowest SQNR in float32 beside the emulation, which sums in another order, in dB.

A wrong tile, or a key behind the last token that is not masked, is below 25."""


@pytest.fixture(scope="module")
def triton_attention() -> ModuleType:
    return importlib.import_module("quant.kernels.sparse.triton_attention")


def draw(tokens: int, batch: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, batch, tokens, heads, width, generator=generator)
    return q, k, v + 1


def draw_kept(tokens: int, batch: int, heads: int, block: int, density: float) -> Tensor:
    """A random choice that keeps one block of each row at least."""
    blocks = -(-tokens // block)
    generator = torch.Generator().manual_seed(blocks)
    drawn = torch.rand(batch, heads, blocks, blocks, generator=generator)
    return (drawn < density) | (drawn == drawn.amax(-1, keepdim=True))


@pytest.mark.parametrize(
    ("tokens", "block", "width", "batch", "tile"),
    [
        (300, 64, 32, 1, 64),
        (300, 64, 64, 2, 32),  # the last block has 44 tokens: one tile and 12 tokens
        (274, 64, 64, 1, 32),  # 18 tokens: less than one tile
        (256, 64, 128, 1, 64),  # no short block
        (200, 128, 128, 1, 64),
        (130, 128, 64, 2, 128),  # 2 tokens
        (90, 16, 32, 2, 64),
        (300, 256, 32, 1, 128),  # a block of two programs
        (40, 64, 64, 1, 64),  # one block, and it is short
    ],
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_it_is_the_emulation(  # noqa: PLR0917 (parameters)
    triton_attention: ModuleType,
    tokens: int,
    block: int,
    width: int,
    batch: int,
    tile: int,
    density: float,
) -> None:
    q, k, v = draw(tokens, batch, 2, width)
    kept = draw_kept(tokens, batch, 2, block, density)
    tiling = triton_attention.Tiling(tile=tile, stages=2, reuse=tile != 64)
    found = triton_attention.attend_blocks(q, k, v, kept, block, tiling)
    expected = attend_blocks(q, k, v, kept, block)
    assert found.shape == q.shape
    assert sqnr_db(expected, found) > AGREEMENT_DB
    if density == 1:
        dense = EagerKernels().attention(q, k, v, None, None)
        assert sqnr_db(dense, found.flatten(2)) > AGREEMENT_DB


def test_peaked_scores_neither_overflow_nor_reach_past_the_last_token(
    triton_attention: ModuleType,
) -> None:
    q, k, v = draw(100, 1, 1, 32)
    # All scores are far below 0, the score of the zeros behind the last token.
    q, k = q.abs() * 8, -k.abs() * 8
    kept = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    kept[..., 0] = False
    found = triton_attention.attend_blocks(q, k, v, kept, 64)
    assert found.isfinite().all()
    assert sqnr_db(attend_blocks(q, k, v, kept, 64), found) > AGREEMENT_DB


def test_a_short_block_does_not_reach_into_the_next_of_a_batch(
    triton_attention: ModuleType,
) -> None:
    q, k, v = draw(70, 2, 1, 32)
    kept = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    both = triton_attention.attend_blocks(q, k, v, kept, 64)
    alone = [
        triton_attention.attend_blocks(*(x[n : n + 1] for x in (q, k, v)), kept[:1], 64)
        for n in (0, 1)
    ]
    assert torch.equal(both, torch.cat(alone))


def test_the_kept_blocks_are_listed_from_the_last_to_the_first(
    triton_attention: ModuleType,
) -> None:
    kept = draw_kept(7 * 16, 2, 3, 16, 0.5)
    lists, counts = triton_attention.list_kept(kept)
    assert lists.dtype == counts.dtype == torch.int32
    for row, listed, count in zip(
        kept.view(-1, 7), lists.view(-1, 7), counts.flatten(), strict=True
    ):
        assert listed[:count].tolist() == row.nonzero().flatten().tolist()[::-1]


def test_chosen_blocks_are_attended_to(triton_attention: ModuleType) -> None:
    q, k, v = draw(150, 1, 2, 32)
    kept = choose_blocks(q, k, 32, 0.5)
    assert not kept.all()
    found = triton_attention.attend_blocks(q, k, v, kept, 32)
    assert sqnr_db(attend_blocks(q, k, v, kept, 32), found) > AGREEMENT_DB


@pytest.mark.parametrize("block", [4, 96])
def test_blocks_that_do_not_fit_are_refused(triton_attention: ModuleType, block: int) -> None:
    q, k, v = draw(100, 1, 1, 32)
    kept = torch.ones(1, 1, 25, 25, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"blocks of {block} tokens: the kernel takes 16, 32"):
        triton_attention.attend_blocks(q, k, v, kept, block)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, triton_attention: ModuleType) -> torch.device:
    """A GPU whose other kernels run; its sparse attention is the interpreter's, in float32."""
    attend = triton_attention.attend_blocks
    monkeypatch.setattr(
        triton_attention,
        "attend_blocks",
        lambda q, k, v, kept, block: attend(q.float(), k.float(), v.float(), kept, block),
    )
    kernels = importlib.import_module("quant.kernels.cuda").CudaKernels()
    monkeypatch.setattr(
        selection, "_pick_on_cuda", lambda *_, **__: selection.KernelChoice(kernels)
    )
    monkeypatch.setattr(
        selection,
        "check_sparse",
        lambda kernels, device, block, shape: check_sparse(
            kernels, torch.device("cpu"), block, shape
        ),
    )
    return torch.device("cuda", 0)


@pytest.mark.parametrize("block", [32, 128])
def test_a_gpu_takes_it_where_it_passes_its_test(gpu: torch.device, block: int) -> None:
    shape = BlockShape(heads=2, width=64, ffn=64)
    choice = pick_kernels(gpu, quantized=True, shape=shape, sparse_block=block)
    assert (choice.kernels.name, choice.warning) == ("cuda with sparse attention", None)
    assert pick_kernels(gpu, quantized=True).kernels.name == "cuda"


def wrong(*arguments: Any) -> Tensor:
    q, k, v, _, block = arguments
    return attend_blocks(q, k, v, torch.ones(1, 2, 5, 5, dtype=torch.bool), block)


def test_where_it_fails_attention_is_emulated_with_the_reason(
    gpu: torch.device, triton_attention: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = pick_kernels(gpu, quantized=True, sparse_block=4)
    assert choice.kernels.name == "cuda"
    assert choice.warning == (
        "Sparse attention is emulated in plain torch, because its kernel does not run (ValueError: "
        "blocks of 4 tokens: the kernel takes 16, 32, 64, 128 and so on): slower than dense "
        "attention."
    )
    monkeypatch.setattr(triton_attention, "attend_blocks", wrong)
    choice = pick_kernels(gpu, quantized=True, sparse_block=32)
    assert choice.kernels.name == "cuda"
    assert choice.warning is not None
    assert "(ConversionError: its sparse attention agrees with plain torch to" in choice.warning
    sparse = importlib.import_module("quant.kernels.cuda").CudaKernels(sparse=True)
    with pytest.raises(ConversionError, match="its sparse attention agrees"):
        check_sparse(sparse, torch.device("cpu"), 32)


def test_plain_torch_says_that_it_is_slower(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = selection.KernelChoice(EagerKernels(), "No tensor cores.")
    monkeypatch.setattr(selection, "_pick_on_cuda", lambda *_, **__: eager)
    choice = pick_kernels(gpu, quantized=True, sparse_block=128)
    assert choice.warning == (
        "No tensor cores. Sparse attention is emulated in plain torch: slower than dense attention."
    )
