"""Sparse attention in a transformer: order of tokens, runs, branches, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fixtures.fused_transformer import fused_transformer
from quant.calibration.scales import check_scales
from quant.errors import ConversionError, ScalesMismatch
from quant.kernels.eager import EagerKernels
from quant.kernels.misfit_counter import CountingKernels
from quant.numerics.metrics import sqnr_db
from quant.recipe.recipe import QuantRecipe
from quant.recipe.sparse import SparseSettings
from quant.transformer.attention.sparse import (
    SparseShares,
    sparse_attention_of,
    tile_order,
)
from quant.transformer.attention.steps import attention_steps_of, denoising_run
from tests.quant.kernels import sparse_reference

GRID, TILE, BLOCK = (3, 5, 3), (2, 2, 2), 8  # 45 tokens in 5 blocks and 5 tokens
SPARSE = SparseSettings(share_of_mass=0.3, tile=TILE, every_steps=2, dense_steps=1)
# BF16 rounds differently in another order of tokens.
SAME_SQNR_DB = 40.0


def sparse_recipe(recipe: QuantRecipe, **changes) -> QuantRecipe:
    settings = dataclasses.replace(SPARSE, **changes)
    return dataclasses.replace(recipe, attention="sparse", sparse=settings)


def latents(seed: int, batch: int = 1) -> Tensor:
    """A grid of `GRID` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, GRID[0], 2 * GRID[1], 2 * GRID[2], generator=generator).bfloat16()


def prompt(seed: int) -> Tensor:
    return torch.randn(1, 8, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()


def shares(transformer) -> SparseShares | None:
    """What sparse attention kept in the last run."""
    sparse = sparse_attention_of(transformer)
    assert sparse is not None
    return sparse.shares()


@torch.no_grad()
def forward(transformer, x: Tensor, text: Tensor) -> Tensor:
    return transformer(
        hidden_states=x,
        timestep=torch.full((len(x),), 500),
        encoder_hidden_states=text,
        return_dict=False,
    )[0]


class RecordingKernels(EagerKernels):
    """Record queries, keys and values of self-attention, and its output in quantized blocks."""

    def __init__(self) -> None:
        self.qkv: list[tuple[Tensor, ...]] = []
        self.attended: list[Tensor] = []
        self._is_attending = False

    def norm_rope(self, x, q_norm, k_norm, rope, heads, scales):
        parts = super().norm_rope(x, q_norm, k_norm, rope, heads, scales)
        if rope is not None:
            self.qkv.append(parts)
            self._is_attending = True
        return parts

    def round_act(self, x, act_scale):
        # What is rounded next is what attention makes of them.
        if self._is_attending and act_scale is not None:
            self.attended.append(x)
        self._is_attending = False
        return super().round_act(x, act_scale)


def test_tokens_follow_box_by_box_and_each_is_there_once():
    order = tile_order((2, 4, 4), (2, 2, 2)).tolist()
    assert order[:8] == [0, 1, 4, 5, 16, 17, 20, 21]
    assert order[8:10] == [2, 3]  # the box to the right
    uneven = tile_order(GRID, TILE)
    assert sorted(uneven.tolist()) == list(range(45))
    assert uneven[:9].tolist() == [0, 1, 3, 4, 15, 16, 18, 19, 2]  # the last column is its own box


@pytest.mark.parametrize("tile", [TILE, (1, 5, 3), (4, 8, 8)])
def test_all_of_the_mass_is_dense_attention(tiny_transformer, tiny_recipe, tiny_scales, tile):
    kernels = EagerKernels()
    dense = fused_transformer(tiny_transformer, kernels, tiny_recipe, tiny_scales)
    recipe = sparse_recipe(tiny_recipe, share_of_mass=1.0, tile=tile)
    sparse = fused_transformer(tiny_transformer, kernels, recipe, tiny_scales)
    x, text = latents(0, batch=2), prompt(0).expand(2, -1, -1)
    assert sqnr_db(forward(dense, x, text), forward(sparse, x, text)) > SAME_SQNR_DB
    some = fused_transformer(tiny_transformer, kernels, sparse_recipe(tiny_recipe), tiny_scales)
    assert sqnr_db(forward(dense, x, text), forward(some, x, text)) < SAME_SQNR_DB


def test_a_run_is_dense_first_and_chooses_again_after_some_steps_for_each_prompt(
    tiny_transformer, tiny_recipe, tiny_scales
):
    kernels = RecordingKernels()
    recipe = sparse_recipe(tiny_recipe)
    transformer = fused_transformer(tiny_transformer, kernels, recipe, tiny_scales)
    prompts = prompt(0), prompt(1)
    with denoising_run(transformer):
        for step in range(5):
            for text in prompts:
                forward(transformer, latents(step), text)
    # [step, prompt, block of the transformer]
    blocks = len(transformer.blocks)
    passes = [kernels.qkv[n : n + blocks] for n in range(0, len(kernels.qkv), blocks)]
    densities, masses = [], []
    attended = iter(kernels.attended)
    for number, parts in enumerate(passes):
        step, branch = divmod(number, 2)
        for block in (1, 2):
            q, k, v = parts[block]
            chosen_in = step - (step - SPARSE.dense_steps) % SPARSE.every_steps
            if step < SPARSE.dense_steps:
                kept = np.ones((1, 2, 6, 6), bool)
            else:
                chosen_q, chosen_k, _ = passes[2 * chosen_in + branch][block]
                kept = sparse_reference.choose(chosen_q, chosen_k, BLOCK, SPARSE.share_of_mass)
            out, mass = sparse_reference.attend(q, k, v, kept, BLOCK)
            ours = next(attended).float().view(out.shape).numpy()
            np.testing.assert_allclose(ours, out, rtol=0, atol=0.02)
            if step == chosen_in:
                sizes = np.array([8, 8, 8, 8, 8, 5]) / 45
                densities.append(np.einsum("bhmn,m,n->bh", kept, sizes, sizes).mean())
                masses.append(mass[:, np.arange(16) * 45 // 16].mean())
    found = shares(transformer)
    assert found is not None
    assert found.density == pytest.approx(np.mean(densities), abs=1e-5)
    assert found.mass == pytest.approx(np.mean(masses), abs=1e-3)
    assert 0.2 < found.density < 0.8


def test_nothing_of_a_run_is_left_for_the_next_one(tiny_transformer, tiny_recipe, tiny_scales):
    transformer = fused_transformer(
        tiny_transformer, EagerKernels(), sparse_recipe(tiny_recipe), tiny_scales
    )
    text = prompt(0)

    def video(first: int) -> list[Tensor]:
        with denoising_run(transformer):
            return [forward(transformer, latents(first + step), text) for step in range(3)]

    before = video(0)
    assert shares(transformer) is not None
    video(10)
    # A pass of no run is sparse, and chooses for itself.
    alone = forward(transformer, latents(1), text)
    assert torch.equal(alone, before[1])
    steps = attention_steps_of(transformer)
    assert steps is not None
    assert steps.branch.prompt is None
    assert not steps.branch.kept
    assert all(map(torch.equal, video(0), before))
    with denoising_run(transformer):
        forward(transformer, latents(0), text)
    assert shares(transformer) is None, "its only step was dense"


def test_what_is_counted_in_a_sampled_step_changes_no_bit(
    tiny_transformer, tiny_recipe, tiny_scales
):
    transformer = fused_transformer(
        tiny_transformer, EagerKernels(), sparse_recipe(tiny_recipe), tiny_scales
    )
    before, counted = forward(transformer, latents(0), prompt(0)), []
    for block in transformer.blocks:
        block.kernels = CountingKernels(block.kernels, lambda *each: counted.append(each))
    assert torch.equal(forward(transformer, latents(0), prompt(0)), before)
    assert counted


def test_scales_of_the_dense_recipe_serve_and_no_others_change(
    tiny_recipe, fp8_recipe, tiny_scales
):
    recipe = sparse_recipe(tiny_recipe)
    fingerprint = tiny_scales.model_fingerprint
    assert check_scales(tiny_scales, model_fingerprint=fingerprint, recipe=recipe) == recipe
    of_sparse = dataclasses.replace(tiny_scales, recipe=recipe)
    found = check_scales(of_sparse, model_fingerprint=fingerprint, recipe=tiny_recipe)
    assert found == tiny_recipe
    other = sparse_recipe(dataclasses.replace(tiny_recipe, protected_blocks=(0,)))
    with pytest.raises(ScalesMismatch, match="the scales are for recipe 'tiny'"):
        check_scales(tiny_scales, model_fingerprint=fingerprint, recipe=other)
    with pytest.raises(ScalesMismatch, match="the scales are for recipe 'tiny'"):
        check_scales(of_sparse, model_fingerprint=fingerprint, recipe=fp8_recipe)


def test_a_block_that_cannot_be_fused_is_refused(tiny_transformer, tiny_recipe, tiny_scales):
    recipe = dataclasses.replace(sparse_recipe(tiny_recipe), kept_linears=("blocks.2.attn1.to_v",))
    with pytest.raises(ConversionError, match=r"needs fused blocks, .* being block 2: "):
        fused_transformer(tiny_transformer, EagerKernels(), recipe, tiny_scales)
