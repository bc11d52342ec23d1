"""Which recipes may take the scales of which."""

from dataclasses import replace

import pytest

from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import scales_serve

DENSE = QuantRecipe.load("boundary-hif8")
FP8 = QuantRecipe.load("boundary-hif8-fp8attn")
SPARSE = QuantRecipe.load("boundary-hif8-sparse")


@pytest.mark.parametrize(
    ("made_for", "recipe"),
    [(FP8, DENSE), (FP8, SPARSE), (DENSE, SPARSE), (SPARSE, DENSE), (FP8, FP8)],
    ids=lambda recipe: recipe.name,
)
def test_scales_serve_recipes_that_differ_in_attention_and_need_no_more(
    made_for: QuantRecipe, recipe: QuantRecipe
) -> None:
    assert scales_serve(made_for, recipe)
    assert scales_serve(replace(made_for, rotate_qk=made_for.attention != "fp8"), DENSE)
    other = replace(recipe, protected_blocks=(0,))
    assert not scales_serve(made_for, other)


@pytest.mark.parametrize("made_for", [DENSE, SPARSE], ids=lambda recipe: recipe.name)
def test_scales_without_those_of_fp8_attention_do_not_serve_it(made_for: QuantRecipe) -> None:
    assert not scales_serve(made_for, FP8)
