"""Quantizing a transformer: what is shared, what is reported, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import nn

from quant.calibration.scales import Scales
from quant.errors import ConversionError
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.conversion_report import weight_bytes
from quant.transformer.module_tree import share_tree
from quant.transformer.quantize import quantize_transformer

KINDS = 10
# Four random blocks lose little; this only checks that the copy computes the same function.
MIN_OUTPUT_SQNR_DB = 20.0


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator).to(torch.bfloat16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 8, 96, generator=generator).to(torch.bfloat16),
    }


@torch.no_grad()
def run(transformer) -> torch.Tensor:
    return transformer(**inputs(), return_dict=False)[0]


@pytest.fixture
def converted(tiny_transformer, tiny_recipe, tiny_scales):
    return tiny_transformer, *quantize_transformer(tiny_transformer, tiny_recipe, tiny_scales)


def quantized_names() -> set[str]:
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    kinds = [f"attn{i}.{name}" for i in (1, 2) for name in attention]
    kinds += ["ffn.net.0.proj", "ffn.net.2"]
    return {f"blocks.{block}.{kind}" for block in (1, 2) for kind in kinds}


def test_exactly_the_recipes_linears_are_replaced(converted):
    source, quantized, _ = converted
    assert {
        n for n, m in quantized.named_modules() if isinstance(m, Hif8Linear)
    } == quantized_names()
    assert not any(isinstance(module, Hif8Linear) for module in source.modules())


def test_every_other_tensor_is_shared_and_no_module_is(converted):
    source, quantized, _ = converted
    ours = dict(quantized.state_dict(keep_vars=True))
    kept = {n: p for n, p in source.state_dict(keep_vars=True).items() if n in ours}
    replaced = set(source.state_dict()) - set(kept)
    assert replaced == {f"{name}.weight" for name in quantized_names()}
    assert all(tensor.data_ptr() == ours[name].data_ptr() for name, tensor in kept.items())
    assert not {id(m) for m in source.modules()} & {id(m) for m in quantized.modules()}


def test_the_source_still_computes_what_it_did(tiny_transformer, tiny_recipe, tiny_scales):
    before = run(tiny_transformer)
    quantized, _ = quantize_transformer(tiny_transformer, tiny_recipe, tiny_scales)
    out = run(quantized)
    assert torch.equal(run(tiny_transformer), before)
    assert MIN_OUTPUT_SQNR_DB < sqnr_db(before, out) < 60


def test_hooks_on_one_tree_do_not_reach_the_other(converted):
    source, quantized, _ = converted
    calls: list[str] = []
    quantized.blocks[0].register_forward_hook(lambda *_: calls.append("quantized"))
    run(source)
    assert calls == []
    run(quantized)
    assert calls == ["quantized"]


def test_the_report_counts_and_weighs(converted):
    source, quantized, report = converted
    assert str(report).startswith("20 linears in 2 of 4 blocks quantized")
    assert (report.linears, report.blocks, report.total_blocks) == (20, 2, 4)
    assert report.weight_bytes == weight_bytes(quantized)
    assert report.source_weight_bytes == weight_bytes(source)
    weights = sum(row.out_features * row.in_features for row in report.rows)
    two_scales = 2 * 4 * report.linears
    assert report.weight_bytes == report.source_weight_bytes - weights + two_scales
    assert weight_bytes(source, quantized) == report.source_weight_bytes + weights + two_scales
    assert all(25 < row.weight_sqnr_db < 40 for row in report.rows)


def test_the_table_has_one_line_per_kind(converted):
    _, _, report = converted
    header, *lines = report.table().splitlines()
    assert header.split()[:3] == ["linear", "blocks", "shape"]
    assert len(lines) == KINDS
    assert lines[0].split()[:5] == ["attn1.to_q", "2", "32", "x", "32"]
    assert lines[-2].split()[:5] == ["ffn.net.0.proj", "2", "64", "x", "32"]
    assert len({len(line) for line in (header, *lines)}) == 1


def test_kept_linears_stay_bf16(tiny_transformer, tiny_recipe, tiny_scales):
    recipe = dataclasses.replace(tiny_recipe, kept_linears=("blocks.*.ffn.net.2",))
    quantized, report = quantize_transformer(tiny_transformer, recipe, tiny_scales)
    assert report.linears == 18
    assert quantized.blocks[1].ffn.net[2].weight is tiny_transformer.blocks[1].ffn.net[2].weight


def test_the_default_recipe_fits_the_miniature():
    from mini.architecture import build_transformer  # noqa: PLC0415 (only this test builds it)

    with torch.device("meta"):
        transformer = build_transformer()
    names = select_linears(transformer, QuantRecipe.load("boundary-hif8"))
    assert len(names) == 350
    assert {name.split(".")[1] for name in names} == {str(block) for block in range(2, 37)}


def refuse(transformer, recipe: QuantRecipe, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        select_linears(transformer, recipe)


def test_another_number_of_blocks_is_refused(tiny_transformer):
    refuse(
        tiny_transformer,
        QuantRecipe.load("boundary-hif8"),
        r"transformer of 40 blocks .*\[0, 1, 37, 38, 39\].*, this one has 4: write a recipe",
    )


def test_a_pattern_that_matches_nothing_is_refused(tiny_transformer, tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe, linears=(*tiny_recipe.linears, "attn3.to_q"))
    refuse(
        tiny_transformer, recipe, r"'attn3.to_q'.* matches no linear in block 1, which has attn1"
    )


def test_another_number_of_linears_is_refused(tiny_transformer, tiny_recipe):
    fewer = dataclasses.replace(tiny_recipe, linears=tiny_recipe.linears[:-1])
    refuse(tiny_transformer, fewer, "implies 10 linears per block, its patterns match 9 in block 1")
    wider = dataclasses.replace(tiny_recipe, linears=("attn*.to_*",))
    refuse(tiny_transformer, wider, "its patterns match 8 in block 1")


def test_a_kept_pattern_that_matches_nothing_is_refused(tiny_transformer, tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe, kept_linears=("blocks.0.ffn.net.2",))
    refuse(tiny_transformer, recipe, r"'blocks.0.ffn.net.2'.* matches none of the 20 linears")


def test_a_model_without_blocks_is_refused(tiny_recipe):
    refuse(nn.Linear(2, 2), tiny_recipe, "Linear has no ModuleList `blocks`")


@pytest.mark.parametrize("kind", ["weight_scale", "act_scale"])
def test_a_missing_scale_is_refused(tiny_transformer, tiny_recipe, tiny_scales: Scales, kind):
    kept = dict(getattr(tiny_scales, kind))
    del kept["blocks.2.ffn.net.2"]
    change: dict[str, Any] = {kind: kept}
    scales = dataclasses.replace(tiny_scales, **change)
    with pytest.raises(ConversionError, match=r"none for 1 of 20 .* blocks.2.ffn.net.2"):
        quantize_transformer(tiny_transformer, tiny_recipe, scales)


def test_hooked_or_patched_modules_are_refused(tiny_transformer):
    handle = tiny_transformer.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ConversionError, match=r"'blocks.1' carries _forward_hooks: quantize first"):
        share_tree(tiny_transformer, lambda *_: None)
    handle.remove()
    tiny_transformer.blocks[1].forward = lambda *_: None
    with pytest.raises(ConversionError, match="a patched forward"):
        share_tree(tiny_transformer, lambda *_: None)


def test_a_tree_that_a_pipeline_has_run_gives_a_shared_copy_that_can_be_cached(tiny_transformer):
    """A pipeline leaves diffusers' hook registry, which refers to its owner, on its transformer."""
    with tiny_transformer.cache_context("cond"):
        before = run(tiny_transformer)
    copy = share_tree(tiny_transformer, lambda *_: None)
    copy.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    with copy.cache_context("cond"):
        assert torch.equal(run(copy), before)


def test_a_module_used_twice_stays_one_module():
    shared = nn.Linear(2, 2)
    copy = share_tree(nn.ModuleDict({"a": shared, "b": shared}), lambda *_: None)
    assert copy["a"] is copy["b"]
    assert copy["a"] is not shared
