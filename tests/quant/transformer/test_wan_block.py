"""Fused blocks equal diffusers' own to the last bit; the choice of kernels and their self-test."""

import gc
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import quant
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import BlockLinear
from quant.kernels.joined_linear import JoinedLinear, SeparateLinears
from quant.kernels.selection import pick_kernels
from quant.kernels.self_test import BlockShape, check_kernels
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import POLICIES
from quant.transformer.module_tree import share_tree
from quant.transformer.wan_block import FusedWanBlock, fuse_blocks
from tests.support.diffusers_reference import with_our_products

CPU = torch.device("cpu")


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    """Build three small blocks with norms that are not all ones, in the dtypes diffusers loads."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=32,
        ffn_dim=128,
        num_layers=3,
        freq_dim=32,
    )
    fp32_names = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if not fp32_names & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval().requires_grad_(requires_grad=False)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    return randn(1, 16, 3, 8, 8), torch.tensor([500.0]), randn(1, 7, 32)


def run(model: WanTransformer3DModel, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*given, return_dict=False)[0]
    return out


def test_fused_is_diffusers_to_the_last_bit(transformer: WanTransformer3DModel) -> None:
    fused = share_tree(transformer, lambda name, module: None)
    assert fuse_blocks(fused, EagerKernels()) == ()
    assert all(isinstance(block, FusedWanBlock) for block in fused.blocks)
    with_our_products(transformer)
    for seed in (0, 1, 0):  # another prompt in between must not be confused with the first
        assert torch.equal(run(fused, inputs(seed)), run(transformer, inputs(seed)))


@pytest.mark.parametrize(
    "kept", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v"]
)
def test_a_block_with_one_plain_linear_beside_quantized_ones_is_not_fused(
    transformer: WanTransformer3DModel, kept: str
) -> None:
    """A fused product would quantize it as well, or leave it out."""
    names = [f"{attention}.to_{part}" for attention in ("attn1", "attn2") for part in "qkv"]
    converted = {f"blocks.1.{name}" for name in names if name != kept}

    def convert(name: str, module: torch.nn.Module) -> torch.nn.Module | None:
        if name not in converted:
            return None
        assert isinstance(module, torch.nn.Linear)
        one = torch.tensor(1.0)
        return Hif8Linear.from_linear(module, one, act_scale=one, act_policy=POLICIES["pow2"])

    mixed = share_tree(transformer, convert)
    assert fuse_blocks(mixed, EagerKernels()) == (1,)
    assert type(mixed.blocks[1]) is type(transformer.blocks[1])
    assert [isinstance(block, FusedWanBlock) for block in mixed.blocks] == [True, False, True]
    assert type(mixed.blocks[1].get_submodule(kept)) is torch.nn.Linear


def test_a_block_whose_activations_have_a_scale_for_each_token_is_not_fused(
    transformer: WanTransformer3DModel,
) -> None:
    """The kernels round by one scale that is known before: there is none."""

    def convert(name: str, module: torch.nn.Module) -> torch.nn.Module | None:
        if not name.startswith("blocks.1.") or not isinstance(module, torch.nn.Linear):
            return None
        one = torch.tensor(1.0)
        return Hif8Linear.from_linear(module, one, act_scale=None, act_policy=POLICIES["pow2"])

    per_token = share_tree(transformer, convert)
    assert fuse_blocks(per_token, EagerKernels()) == (1,)


def test_a_prompt_is_cached_only_while_its_tensor_exists(
    transformer: WanTransformer3DModel,
) -> None:
    fuse_blocks(transformer, EagerKernels())
    embedder = transformer.condition_embedder.text_embedder
    seen: list[Tensor] = []
    embedder.embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    given = inputs()
    first, second = run(transformer, given), run(transformer, given)
    assert torch.equal(first, second)
    assert len(seen) == 1
    blocks = transformer.blocks
    assert [len(block._cached_kv) for block in blocks] == [1, 1, 1]
    del given
    gc.collect()
    assert [len(block._cached_kv) for block in blocks] == [0, 0, 0]


def test_joined_linears_compute_the_same_and_take_no_memory_twice(
    transformer: WanTransformer3DModel,
) -> None:
    attention = transformer.blocks[0].attn1
    linears = [attention.to_q, attention.to_k, attention.to_v]
    x = inputs()[0].reshape(-1, 48)[:5]
    separate = SeparateLinears(linears)(x)
    before = quant.weight_bytes(transformer)
    joined = JoinedLinear(linears)
    assert quant.sqnr_db(separate, joined(x)) > 40
    assert quant.weight_bytes(transformer, joined) == before
    again = JoinedLinear(linears)  # of a tree that shares them
    assert again.weight.data_ptr() == joined.weight.data_ptr()
    assert torch.equal(again(x), joined(x))


def test_on_a_cpu_blocks_run_in_plain_torch() -> None:
    for quantized in (False, True):
        choice = pick_kernels(CPU, quantized=quantized)
        assert isinstance(choice.kernels, EagerKernels)
        assert choice.warning is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a GPU with FP8 as torch would describe it; nothing can run on it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_a_gpu_without_fp8_emulates_quantized_modes_with_a_warning(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choice = pick_kernels(gpu, quantized=True)
    assert isinstance(choice.kernels, EagerKernels)
    assert choice.warning is not None
    assert re.search(r"Some GPU \(compute capability 8\.0\) has no FP8", choice.warning)
    assert "longer than bf16" in choice.warning


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_that_do_not_run_are_replaced_with_a_warning(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    monkeypatch.setitem(sys.modules, "quant.kernels.cuda", None)  # as where Triton is missing
    choice = pick_kernels(gpu, quantized=quantized)
    assert isinstance(choice.kernels, EagerKernels)
    assert choice.warning is not None
    expected = (
        r"The kernels for Some GPU do not run \(ModuleNotFoundError: .*kernels.cuda.*\); plain"
    )
    assert re.search(expected, choice.warning)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_fp8_attention_that_does_not_run_is_refused(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """An emulated step would take minutes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "quant.kernels.cuda", None)
    expected = r"FP8 attention does not run here: .*Some GPU.* a recipe with attention 'bf16'"
    with pytest.raises(quant.ConversionError, match=expected):
        pick_kernels(gpu, quantized=True, fp8_attention=True)


class NanKernels(EagerKernels):
    """Kernels whose GELU returns NaN only."""

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        return torch.full_like(x, torch.nan)


def test_kernels_that_compute_no_numbers_are_not_trusted() -> None:
    with pytest.raises(quant.ConversionError, match=r"its GELU agrees .* nan dB"):
        check_kernels(NanKernels(), CPU, quantized=True)


class NarrowKernels(EagerKernels):
    """Kernels that compile for small widths only."""

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        if x.shape[-1] > 1000:
            raise RuntimeError("out of resources: shared memory")
        return super().add_gated(x, delta, gate)

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        if x.shape[-1] > 2000:
            raise RuntimeError("out of registers")
        return super().gelu(x, act_scale)


def test_kernels_are_tested_at_the_width_of_the_model() -> None:
    check_kernels(NarrowKernels(), CPU, quantized=True)
    check_kernels(NarrowKernels(), CPU, quantized=True, shape=BlockShape(2, 512, 1024))
    for shape, expected in (
        (BlockShape(8, 1024, 2000), "shared memory"),
        (BlockShape(4, 512, 2048), "registers"),
    ):
        with pytest.raises(RuntimeError, match=expected):
            check_kernels(NarrowKernels(), CPU, quantized=True, shape=shape)


class WrongKernels(EagerKernels):
    """Kernels that ignore the gate."""

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        return x + delta


class NanHidingKernels(EagerKernels):
    """Kernels that replace NaN by a number."""

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        return super().round_act(x, act_scale).nan_to_num()


class ShortCrossKernels(EagerKernels):
    """Kernels that leave out the last few keys, if there are not many."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        if k.shape[1] < 1000:
            k, v = k[:, :-4], v[:, :-4]
        return super().attention(q, k, v, *rest)


def test_cross_attention_is_tested() -> None:
    with pytest.raises(quant.ConversionError, match=r"its cross-attention agrees"):
        check_kernels(ShortCrossKernels(), CPU, quantized=True)


@pytest.mark.parametrize("attribute", ["head_size", "queries"])
def test_attention_is_tested_at_the_models_head_size_and_for_both_kinds_of_tiles(
    attribute: str,
) -> None:
    seen: set[int] = set()

    class Recording(EagerKernels):
        def attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            seen.add(q.shape[-1] if attribute == "head_size" else -(-q.shape[1] // 128) % 2)
            return super().attention(q, k, v, *rest)

    check_kernels(Recording(), CPU, quantized=True, shape=BlockShape(2, 96, 128))
    assert seen == ({48} if attribute == "head_size" else {0, 1})


class RowBlindKernels(EagerKernels):
    """Kernels that use the first row's scale for all rows."""

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        for linear in linears:
            linear.weight_scale = linear.weight_scale.reshape(-1)[:1].reshape(())
        return super().quantized(linears)


def test_a_scale_for_each_row_is_tested_where_a_recipe_has_it() -> None:
    check_kernels(EagerKernels(), CPU, quantized=True, per_row_scales=True)
    check_kernels(RowBlindKernels(), CPU, quantized=True)
    with pytest.raises(quant.ConversionError, match=r"its product by rows agrees .* dB"):
        check_kernels(RowBlindKernels(), CPU, quantized=True, per_row_scales=True)


def test_kernels_that_compute_something_else_are_not_trusted() -> None:
    for quantized in (False, True):
        check_kernels(EagerKernels(), CPU, quantized=quantized)
        with pytest.raises(quant.ConversionError, match=r"its gated norm's sum agrees .* -?\d+ dB"):
            check_kernels(WrongKernels(), CPU, quantized=quantized)
    with pytest.raises(quant.ConversionError, match="of NaN, infinity"):
        check_kernels(NanHidingKernels(), CPU, quantized=True)
