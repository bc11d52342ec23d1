"""Recipes: the default recipe, round trips, fingerprints, and errors."""

import dataclasses
import json
import tomllib
from importlib import resources

import pytest

from quant.errors import RecipeError
from quant.numerics.granularity import PerChannel, PerTensor, PerToken
from quant.numerics.scaling import POLICIES
from quant.recipe.recipe import QuantRecipe, shipped_recipes


def test_the_default_recipe_is_the_papers():
    recipe = QuantRecipe.load("boundary-hif8")
    assert recipe.format == "hif8"
    assert recipe.total_blocks == 40
    assert recipe.protected_blocks == (0, 1, 37, 38, 39)
    assert recipe.quantized_blocks == tuple(range(2, 37))
    assert recipe.linears_per_block == len(recipe.linears) == 10
    assert (recipe.weight_granularity, recipe.act_granularity) == (PerTensor(), PerTensor())
    assert recipe.weight_policy == recipe.act_policy == POLICIES["pow2"]


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({}, False),
        ({"weight_policy": POLICIES["sqnr"]}, False),
        ({"weight_policy": POLICIES["amax15"]}, True),
        ({"weight_granularity": PerChannel()}, True),
        ({"act_policy": POLICIES["amax15"]}, False),
    ],
)
def test_a_recipe_says_whether_products_take_a_scale_for_each_row(changed, rows):
    recipe = QuantRecipe.load("boundary-hif8")
    assert dataclasses.replace(recipe, **changed).per_row_scales is rows


def test_fp8_attention_is_one_word_more_than_the_default_recipe():
    plain, fp8 = (QuantRecipe.load(f"boundary-hif8{end}") for end in ("", "-fp8attn"))
    assert (plain.attention, fp8.attention) == ("bf16", "fp8")
    assert "attention" not in plain.to_dict()
    assert fp8.fingerprint != plain.fingerprint
    same = dataclasses.replace(fp8, attention="bf16")
    assert same.fingerprint == plain.fingerprint
    assert QuantRecipe.from_json(fp8.to_json()) == fp8


def test_fingerprints_of_recipes_without_the_option_are_what_they_were():
    """Existing scales files contain this fingerprint."""
    shipped = "sha256:15a92fcc65460ef99ba29fbe981975e6f8595db5d0ac23ec1a28b7487e6f0f3e"
    assert QuantRecipe.load("boundary-hif8").fingerprint == shipped


def test_the_rotation_is_on_and_part_of_the_fingerprint_only_if_it_is_off():
    """Scales files of before the option contain this fingerprint, and stay valid."""
    fp8 = QuantRecipe.load("boundary-hif8-fp8attn")
    assert fp8.rotate_qk
    assert "rotate_qk" not in fp8.to_dict()
    shipped = "sha256:0e1d7a6370ea66d92989411c6c3098584ea069018c71612d3c39a7b5d8ca6cec"
    assert fp8.fingerprint == shipped
    without = dataclasses.replace(fp8, rotate_qk=False)
    assert without.fingerprint != fp8.fingerprint
    assert QuantRecipe.from_json(without.to_json()) == without


def test_first_steps_in_bf16_change_the_fingerprint_but_not_the_scales():
    fp8 = QuantRecipe.load("boundary-hif8-fp8attn")
    assert "attention_bf16_steps" not in fp8.to_dict()
    later = dataclasses.replace(fp8, attention_bf16_steps=2)
    assert QuantRecipe.from_json(later.to_json()) == later
    assert later.fingerprint != fp8.fingerprint == later.calibrated.fingerprint
    assert later.attention_inputs == fp8.attention_inputs
    sparse = QuantRecipe.load("boundary-hif8-sparse")
    found = [each.exact_attention_steps for each in (fp8, later, sparse)]
    assert found == [0, 2, 10]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_under_its_own_name(name: str):
    assert QuantRecipe.load(name).name == name


def test_json_round_trip_is_equal_and_keeps_the_fingerprint(recipe_dict):
    changes = {
        "kept_linears": ["blocks.*.ffn.net.2"],
        "weight": {"granularity": "per_channel", "policy": "sqnr"},
        "act": {"granularity": "per_token", "policy": "amax15"},
    }
    recipe = QuantRecipe.from_dict(recipe_dict | changes)
    again = QuantRecipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert recipe.weight_granularity == PerChannel()
    assert recipe.act_granularity == PerToken()


def test_toml_and_json_files_read_the_same(tmp_path):
    shipped = resources.files("quant.recipe") / "presets" / "boundary-hif8.toml"
    text = shipped.read_text(encoding="utf-8")
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(tomllib.loads(text)), encoding="utf-8")
    from_toml, from_json = (QuantRecipe.load(tmp_path / f"r.{kind}") for kind in ("toml", "json"))
    assert from_toml == from_json == QuantRecipe.load("boundary-hif8")
    assert from_toml.source == str(tmp_path / "r.toml")
    assert str(tmp_path) not in from_toml.to_json()


def test_the_fingerprint_is_of_the_numbers_not_of_the_words(tiny_recipe):
    renamed = dataclasses.replace(tiny_recipe, name="other", description="other")
    reordered = dataclasses.replace(tiny_recipe, linears=tiny_recipe.linears[::-1])
    changed = dataclasses.replace(tiny_recipe, act_policy=POLICIES["none"])
    assert tiny_recipe.fingerprint.startswith("sha256:")
    assert renamed.fingerprint == reordered.fingerprint == tiny_recipe.fingerprint
    assert changed.fingerprint != tiny_recipe.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this tool reads 1"),
        ({"format": "int4"}, "format 'int4' is not one of hif8, int8"),
        ({"protected_blocks": [0, 4]}, r"protected_blocks \[4\] lie outside 0..3"),
        ({"protected_blocks": [3, 0]}, "must ascend without repetition"),
        ({"protected_blocks": [True]}, "must be a list of int"),
        ({"protected_blocks": "auto"}, "must be a list of int, not 'auto'"),
        ({"total_blocks": 0, "protected_blocks": []}, "at least one block"),
        ({"total_blocks": "4"}, "total_blocks must be int, not '4'"),
        ({"linears": []}, "at least one block, one linear per block and one pattern"),
        ({"smoothing": 0.5}, "unknown keys: smoothing"),
        ({"weight": {"granularity": "per_token", "policy": "pow2"}}, "weight granularity"),
        ({"weight": {"granularity": "per_tensor"}}, r"table \[weight\] must hold granularity and"),
        ({"weight": {"granularity": 1, "policy": "pow2"}}, r"table \[weight\] holds names, not 1"),
        ({"act": {"granularity": "per_channel", "policy": "pow2"}}, "act granularity"),
        ({"act": {"granularity": "per_tensor", "policy": "max"}}, "scale policy 'max'"),
        ({"act": {"granularity": "per_token", "policy": "sqnr"}}, "needs calibration statistics"),
        ({"attention": "fp4"}, "attention 'fp4' is not one of bf16, fp8, sparse"),
        ({"attention": 8}, "attention must be str, not 8"),
        (
            {"attention": "fp8", "act": {"granularity": "per_token", "policy": "pow2"}},
            "needs fused blocks, which act granularity 'per_token' rules out",
        ),
        ({"rotate_qk": False}, "rotate_qk has no effect with attention 'bf16'"),
        ({"attention": "fp8", "rotate_qk": 1}, "rotate_qk must be bool, not 1"),
        ({"attention_bf16_steps": 1}, "attention_bf16_steps has no effect with attention 'bf16'"),
        ({"attention": "fp8", "attention_bf16_steps": -1}, "attention_bf16_steps -1 is below 0"),
        ({"attention": "fp8", "attention_bf16_steps": 1.5}, "must be int, not 1.5"),
    ],
)
def test_bad_values_are_named(recipe_dict, changes, message):
    with pytest.raises(RecipeError, match=message):
        QuantRecipe.from_dict(recipe_dict | changes)


INT8 = {
    "format": "int8",
    "weight": {"granularity": "per_channel", "policy": "amax127"},
    "act": {"granularity": "per_token", "policy": "amax127"},
}


def test_int8_needs_no_prompts_and_says_what_it_is(recipe_dict):
    recipe = QuantRecipe.from_dict(recipe_dict | INT8)
    assert not recipe.needs_prompts
    assert QuantRecipe.from_dict(recipe_dict).needs_prompts
    preset = QuantRecipe.load("boundary-int8")
    assert preset.format == "int8"
    assert "INT8" in preset.description
    assert "HiFloat8" not in preset.description
    assert preset.protected_blocks == QuantRecipe.load("boundary-hif8").protected_blocks
    assert preset.keeps("blocks.2.ffn.net.2")
    assert not preset.keeps("blocks.2.ffn.net.0.proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": {"granularity": "per_channel", "policy": "pow2"}},
            "weight policy 'pow2' chooses scales for format 'hif8', not for 'int8': use 'amax127'",
        ),
        (
            {"act": {"granularity": "per_token", "policy": "amax15"}},
            "act policy 'amax15' chooses scales for format 'hif8', not for 'int8': use 'amax127'",
        ),
        (
            {"weight": {"granularity": "per_tensor", "policy": "amax127"}},
            "format 'int8' needs weight granularity 'per_channel', not 'per_tensor'",
        ),
        (
            {"act": {"granularity": "per_tensor", "policy": "amax127"}},
            "format 'int8' needs act granularity 'per_token', not 'per_tensor'",
        ),
        ({"attention": "fp8"}, "attention 'fp8' rounds .* to HiFloat8 .*: use attention 'bf16'"),
        (
            {"format": "hif8"},
            "weight policy 'amax127' chooses scales for format 'int8', not for 'hif8': use 'pow2' "
            "or 'sqnr' or",
        ),
    ],
)
def test_what_does_not_go_with_int8_is_refused(recipe_dict, changes, message):
    with pytest.raises(RecipeError, match=message):
        QuantRecipe.from_dict(recipe_dict | INT8 | changes)


def test_missing_keys_are_named(recipe_dict):
    del recipe_dict["total_blocks"]
    with pytest.raises(RecipeError, match="recipe lacks total_blocks"):
        QuantRecipe.from_dict(recipe_dict)


def test_unknown_names_and_broken_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe 'nope'.*one of auto-hif8, boundary-hif8"):
        QuantRecipe.load("nope")
    with pytest.raises(RecipeError, match="no recipe"):
        QuantRecipe.load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ", encoding="utf-8")
    with pytest.raises(RecipeError, match="does not parse"):
        QuantRecipe.load(broken)
    with pytest.raises(RecipeError, match="not JSON"):
        QuantRecipe.from_json("{")


SPARSE = {"share_of_mass": 0.9, "tile": [2, 8, 8], "every_steps": 5, "dense_steps": 10}


def test_sparse_attention_is_data_of_its_own_and_needs_no_scales_of_its_own(recipe_dict):
    dense = QuantRecipe.from_dict(recipe_dict)
    sparse = QuantRecipe.from_dict(recipe_dict | {"attention": "sparse", "sparse": SPARSE})
    assert sparse.sparse is not None
    assert sparse.sparse.block == 128
    assert QuantRecipe.from_json(sparse.to_json()) == sparse
    assert sparse.fingerprint != dense.fingerprint == sparse.calibrated.fingerprint
    wider = QuantRecipe.from_dict(
        recipe_dict | {"attention": "sparse", "sparse": SPARSE | {"share_of_mass": 1}}
    )
    assert wider.fingerprint != sparse.fingerprint
    assert not sparse.attention_inputs
    shipped = [QuantRecipe.load(name) for name in shipped_recipes() if name.endswith("sparse")]
    assert shipped
    for recipe in shipped:
        base = QuantRecipe.load(recipe.name.removesuffix("-sparse").removesuffix("-mini"))
        assert recipe.calibrated.fingerprint == base.fingerprint


def test_sparse_attention_goes_with_int8_but_not_with_a_scale_for_each_token(recipe_dict):
    sparse = {"attention": "sparse", "sparse": SPARSE}
    assert QuantRecipe.from_dict(recipe_dict | INT8 | sparse).format == "int8"
    per_token = {"act": {"granularity": "per_token", "policy": "pow2"}}
    with pytest.raises(RecipeError, match="attention 'sparse' needs fused blocks"):
        QuantRecipe.from_dict(recipe_dict | sparse | per_token)


@pytest.mark.parametrize(
    ("attention", "table", "message"),
    [
        ("sparse", None, r"attention 'sparse' needs a table \[sparse\]"),
        ("bf16", {}, r"'bf16' and a table \[sparse\] do not go together"),
        ("fp8", {}, r"'fp8' and a table \[sparse\] do not go together"),
        ("sparse", {"share_of_mass": 0}, "share_of_mass 0.0 is not above 0 and at most 1"),
        ("sparse", {"share_of_mass": 1.01}, "share_of_mass 1.01 is not above 0 and at most 1"),
        ("sparse", {"share_of_mass": True}, "share_of_mass must be a number, not True"),
        ("sparse", {"tile": [8, 8]}, r"tile \[8, 8\] is not three positive numbers"),
        ("sparse", {"tile": [0, 8, 8]}, r"tile \[0, 8, 8\] is not three positive numbers"),
        ("sparse", {"tile": 8}, "tile must be a list of int, not 8"),
        ("sparse", {"every_steps": 0}, "every_steps 0 and dense_steps 10 are below"),
        ("sparse", {"dense_steps": 1.5}, "counts in int, not 1.5"),
        ("sparse", {"top_k": 3}, r"table \[sparse\] must hold share_of_mass, tile, every_steps"),
    ],
)
def test_bad_values_of_sparse_attention_are_named(recipe_dict, attention, table, message):
    tables = {} if table is None else {"sparse": SPARSE | table}
    with pytest.raises(RecipeError, match=message):
        QuantRecipe.from_dict(recipe_dict | {"attention": attention} | tables)
