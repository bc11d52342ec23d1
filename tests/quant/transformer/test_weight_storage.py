"""Weights that are decoded once give the same bits, take what is planned, and free their codes."""

import gc
import weakref

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from quant import QuantRecipe, Scales, decode_weights, quantize_transformer, weight_bytes
from quant.kernels.eager import EagerKernels
from quant.numerics.grid_linear import GridLinear
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import POLICIES
from quant.transformer.fuse import fuse_quantized
from quant.transformer.module_tree import share_tree
from quant.transformer.weight_storage import decoded_extra_bytes


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "a scale per row"])
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "per token"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_decoded_linear_gives_the_same_bits(per_row: bool, per_token: bool, bias: bool) -> None:
    source = torch.nn.Linear(48, 32, bias=bias, dtype=torch.bfloat16)
    # Not a power of two, so that the product of code and scale is rounded.
    scale = torch.linspace(0.01, 0.03, 32)[:, None] if per_row else torch.tensor(0.03)
    packed = Hif8Linear.from_linear(
        source,
        scale,
        act_scale=None if per_token else torch.tensor(0.25),
        act_policy=POLICIES["pow2"],
    )
    decoded = GridLinear.from_hif8(packed)
    x = randn(2, 3, 48)
    assert torch.equal(decoded(x), packed(x))
    assert decoded.bias is source.bias
    assert [name for name, _ in decoded.named_buffers()] == ([] if per_token else ["act_scale"])


def one_pass(transformer: WanTransformer3DModel) -> Tensor:
    given = randn(1, 16, 3, 8, 8), torch.tensor([500.0]), randn(1, 7, transformer.config.text_dim)
    with torch.no_grad():
        out: Tensor = transformer(*given, return_dict=False)[0]
    return out


@pytest.mark.parametrize("fused", [True, False])
def test_a_decoded_transformer_gives_the_same_bits(
    tiny_transformer: WanTransformer3DModel,
    tiny_recipe: QuantRecipe,
    tiny_scales: Scales,
    fused: bool,
) -> None:
    packed, _ = quantize_transformer(tiny_transformer, tiny_recipe, tiny_scales)
    decoded = share_tree(packed, lambda _name, _module: None)
    extra = decoded_extra_bytes(packed)
    decode_weights(decoded)
    assert sum(isinstance(each, GridLinear) for each in decoded.modules()) == 20
    assert weight_bytes(decoded) - weight_bytes(packed) == extra > 0
    assert decoded_extra_bytes(decoded) == 0
    if fused:
        for each in (packed, decoded):
            assert fuse_quantized(each, EagerKernels(), {}) == ()
    assert torch.equal(one_pass(decoded), one_pass(packed))


def test_codes_are_freed_layer_by_layer(
    tiny_transformer: WanTransformer3DModel,
    tiny_recipe: QuantRecipe,
    tiny_scales: Scales,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a block would need its codes and its decoded weights at once."""
    tree, _ = quantize_transformer(tiny_transformer, tiny_recipe, tiny_scales)
    codes = [
        weakref.ref(each.weight_qdata) for each in tree.modules() if isinstance(each, Hif8Linear)
    ]
    alive: list[int] = []
    decode = GridLinear.from_hif8

    def count(linear: Hif8Linear) -> GridLinear:
        alive.append(sum(each() is not None for each in codes))
        return decode(linear)

    gc.collect()
    monkeypatch.setattr(GridLinear, "from_hif8", count)
    gc.disable()
    try:
        decode_weights(tree)
    finally:
        gc.enable()
    assert alive == list(range(20, 0, -1))
    assert not any(each() is not None for each in codes)
