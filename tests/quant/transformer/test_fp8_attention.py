"""Recipes with FP8 attention: calibration, the scales file, fusing, and what is refused."""

import dataclasses
import re
import shlex
import sys

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.fixtures.fused_transformer import fused_transformer
from quant.calibration.calibrate import run_calibration
from quant.calibration.sampling import load_pipeline
from quant.calibration.scales import Scales, check_scales, load_scales, save_scales
from quant.calibration.summary import describe_scales
from quant.errors import CalibrationError, ConversionError, ScalesError, ScalesMismatch
from quant.kernels.eager import EagerKernels, fp8_attention
from quant.kernels.interface import AttentionScales
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import NUM_BINADES
from quant.recipe.recipe import QuantRecipe
from quant.transformer.attention.steps import denoising_run
from quant.transformer.fuse import attention_scales, fuse_quantized
from quant.transformer.module_tree import share_tree
from quant.transformer.quantize import quantize_transformer
from quant.transformer.wan_block import FusedWanBlock

BLOCKS = (1, 2)
NAMES = tuple(f"blocks.{block}.attn1.{part}" for block in BLOCKS for part in "qkv")
# Rounding queries, keys, values and the output costs far less than an error in the code would.
MIN_ATTENTION_SQNR_DB = 20.0


@pytest.fixture
def path(tmp_path, fp8_scales: Scales):
    save_scales(fp8_scales, tmp_path / "fp8.safetensors")
    return tmp_path / "fp8.safetensors"


class RecordingKernels(EagerKernels):
    """Record the largest magnitudes of q, k and v in the self-attention of every block.

    Record as well under which scales it runs.
    """

    def __init__(self) -> None:
        self.amax: list[tuple[float, ...]] = []
        self.scales: list[AttentionScales | None] = []

    def attention(self, q, k, v, scales, act_scale):
        if q.shape == k.shape:  # the prompt has another length
            self.scales.append(scales)
            self.amax.append(tuple(part.abs().amax().item() for part in (q, k, v)))
        return super().attention(q, k, v, scales, act_scale)


@torch.no_grad()
def run(transformer, text: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator).to(torch.bfloat16)
    if text is None:
        text = torch.randn(1, 8, 96, generator=generator).to(torch.bfloat16)
    return transformer(
        latents,
        timestep=torch.tensor([700]),
        encoder_hidden_states=text,
        return_dict=False,
    )[0]


def sample(pipe: WanPipeline, scales: Scales, seed: int) -> None:
    sampler = scales.sampler
    assert sampler is not None
    pipe(
        prompt="a red a",
        negative_prompt="",
        width=sampler.size[0],
        height=sampler.size[1],
        num_frames=sampler.num_frames,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        max_sequence_length=sampler.text_tokens,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )


def test_scales_hold_what_attention_sees_after_the_rotary_embedding(tiny_model, fp8_scales):
    """Run the first prompt again and compare with what its attention really received."""
    pipe = load_pipeline(tiny_model, "cpu")
    kernels = RecordingKernels()
    pipe.transformer = fused_transformer(pipe.transformer, kernels)
    pipe.set_progress_bar_config(disable=True)
    sample(pipe, fp8_scales, seed=0)
    assert len(kernels.amax) == 4 * 2 * 4  # steps, with and without the prompt, blocks
    by_block = torch.tensor(kernels.amax).view(8, 4, 3).amax(0)[list(BLOCKS)].flatten()
    bounds = fp8_scales.attention_amax[:, :, 0].amax(1)
    # Queries and keys: no angle exceeds the length of the pair, and some angle comes near it. BF16
    # rounds what was turned, by half a last bit.
    assert (by_block <= bounds * (1 + 2**-8)).all()
    assert (by_block >= bounds / 2).all()
    values = [index for index, name in enumerate(NAMES) if name.endswith(".v")]
    assert torch.equal(by_block[values], bounds[values])


def test_scales_bring_what_was_seen_into_8_to_16(fp8_scales: Scales):
    assert tuple(fp8_scales.attention_scale) == NAMES
    seen = fp8_scales.attention_amax.amax((1, 2))
    for name, amax in zip(NAMES, seen, strict=True):
        assert 8 <= amax / fp8_scales.attention_scale[name] < 16


def test_statistics_have_the_documented_shapes(fp8_scales: Scales, tiny_scales: Scales):
    rows = len(NAMES)
    assert fp8_scales.attention_amax.shape == (rows, 2, 10)
    assert fp8_scales.attention_mean_square.shape == (rows, 2, 10)
    assert fp8_scales.attention_binades.shape == (rows, 2, NUM_BINADES)
    assert tiny_scales.attention_amax.shape == (0, 2, 10)
    assert tiny_scales.attention_scale == {}
    # The linears' own do not depend on it.
    assert torch.equal(fp8_scales.act_amax, tiny_scales.act_amax)
    assert fp8_scales.act_scale == tiny_scales.act_scale


def test_the_file_gives_back_what_was_found(path, fp8_scales: Scales, fp8_recipe: QuantRecipe):
    loaded = load_scales(path, recipe=fp8_recipe)
    assert loaded.recipe == fp8_recipe
    assert loaded.attention_scale == fp8_scales.attention_scale
    assert torch.equal(loaded.attention_amax, fp8_scales.attention_amax)
    assert torch.equal(loaded.attention_binades, fp8_scales.attention_binades)
    assert re.search("attention +fp8, scales q ", describe_scales(loaded, path))


def test_a_file_without_them_is_refused_with_the_command(tmp_path, tiny_scales, fp8_recipe):
    path = tmp_path / "bf16.safetensors"
    save_scales(tiny_scales, path)
    assert load_scales(path).attention_scale == {}
    with pytest.raises(
        ScalesMismatch, match="no scales for the FP8 attention of recipe 'tiny-fp8'"
    ) as e:
        load_scales(path, recipe=fp8_recipe)
    command = shlex.split(str(e.value).rpartition("with: ")[2])
    assert command[:4] == [sys.executable, "-m", "quant", "calibrate"]
    assert command[command.index("--recipe") + 1] == "RECIPE_FILE"  # no shipped recipe
    assert command[command.index("--steps") + 1] == "4"


def test_scales_with_those_of_attention_serve_the_recipe_without(fp8_scales: Scales, tiny_recipe):
    fingerprint = fp8_scales.model_fingerprint
    assert check_scales(fp8_scales, model_fingerprint=fingerprint, recipe=tiny_recipe) == (
        tiny_recipe
    )
    other = dataclasses.replace(tiny_recipe, protected_blocks=(0,))
    with pytest.raises(ScalesMismatch, match="scales are for recipe 'tiny-fp8'"):
        check_scales(fp8_scales, model_fingerprint=fingerprint, recipe=other)


def test_a_file_that_lost_one_is_none(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["blocks.2.attn1.k.attention_scale"]
    save_file(tensors, path, metadata)
    with pytest.raises(ScalesError, match=r"no attention_scale for blocks\.2\.attn1\.k"):
        load_scales(path)


def test_a_value_that_is_not_finite_stops_calibration(tiny_model, tiny_plan, fp8_recipe):
    pipe = load_pipeline(tiny_model, "cpu")
    norm = pipe.transformer.blocks[1].attn1.norm_k
    norm.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))
    with pytest.raises(CalibrationError, match=r"^blocks\.1\.\S+ saw NaN or infinity"):
        run_calibration(pipe, dataclasses.replace(tiny_plan, recipe=fp8_recipe))


def test_each_block_gets_its_scales(fp8_recipe: QuantRecipe, fp8_scales: Scales, tiny_recipe):
    found = attention_scales(fp8_recipe, fp8_scales)
    assert tuple(found) == BLOCKS
    assert found[2].k == fp8_scales.attention_scale["blocks.2.attn1.k"]
    assert attention_scales(tiny_recipe, fp8_scales) == {}


def test_bf16_on_kernels_computes_the_same_bits(tiny_transformer):
    before = run(tiny_transformer)
    shared = share_tree(tiny_transformer, lambda *_: None)
    assert fuse_quantized(shared, EagerKernels(), {}) == ()
    assert all(isinstance(block, FusedWanBlock) for block in shared.blocks)
    assert torch.equal(run(shared), before)
    assert torch.equal(run(tiny_transformer), before)


def test_quantized_on_kernels_is_near_and_leaves_the_source(
    tiny_transformer, fp8_recipe, fp8_scales
):
    before = run(tiny_transformer)
    quantized, report = quantize_transformer(tiny_transformer, fp8_recipe, fp8_scales)
    assert fuse_quantized(quantized, EagerKernels(), attention_scales(fp8_recipe, fp8_scales)) == ()
    assert report.linears == 20
    assert not any(isinstance(module, Hif8Linear) for module in tiny_transformer.modules())
    with_fp8 = run(quantized)
    plain = dataclasses.replace(fp8_recipe, attention="bf16")
    without = run(fused_transformer(tiny_transformer, EagerKernels(), plain, fp8_scales))
    assert torch.equal(run(tiny_transformer), before)
    assert not torch.equal(with_fp8, without)
    assert sqnr_db(without, with_fp8) > MIN_ATTENTION_SQNR_DB
    assert sqnr_db(before, with_fp8) > MIN_ATTENTION_SQNR_DB


def test_only_quantized_blocks_have_fp8_attention(tiny_transformer, fp8_recipe, fp8_scales):
    fused = fused_transformer(tiny_transformer, EagerKernels(), fp8_recipe, fp8_scales)
    has = [block.attention_scales is not None for block in fused.blocks]
    assert has == [False, True, True, False]


def test_a_block_that_cannot_be_fused_is_refused(tiny_transformer, fp8_recipe, fp8_scales):
    recipe = dataclasses.replace(fp8_recipe, kept_linears=("blocks.2.attn1.to_v",))
    with pytest.raises(ConversionError, match=r"needs fused blocks, .* being block 2: "):
        fused_transformer(tiny_transformer, EagerKernels(), recipe, fp8_scales)


def test_heads_that_the_kernel_cannot_take_are_refused(tiny_transformer, fp8_recipe, fp8_scales):
    tiny_transformer.register_to_config(attention_head_dim=24)
    scales = attention_scales(fp8_recipe, fp8_scales)
    with pytest.raises(ConversionError, match=r"multiple of 16 channels, .* have 24"):
        fuse_quantized(tiny_transformer, EagerKernels(), scales)
    assert not any(isinstance(block, FusedWanBlock) for block in tiny_transformer.blocks)


def test_the_rotation_changes_what_is_rounded_and_no_score(
    tiny_transformer, fp8_recipe, fp8_scales
):
    off = dataclasses.replace(fp8_recipe, rotate_qk=False)
    rotated, plain = (
        fused_transformer(tiny_transformer, EagerKernels(), recipe, fp8_scales)
        for recipe in (fp8_recipe, off)
    )
    assert [block.attention_scales.rotate for block in rotated.blocks[1:3]] == [True, True]
    assert [block.attention_scales.rotate for block in plain.blocks[1:3]] == [False, False]
    first, second = run(rotated), run(plain)
    assert not torch.equal(first, second)
    assert sqnr_db(second, first) > MIN_ATTENTION_SQNR_DB


def test_the_first_steps_of_a_run_attend_in_bf16_for_each_prompt(
    tiny_transformer, fp8_recipe, fp8_scales
):
    kernels, recipe = RecordingKernels(), dataclasses.replace(fp8_recipe, attention_bf16_steps=2)
    fused = fused_transformer(tiny_transformer, kernels, recipe, fp8_scales)
    prompts = [torch.full((1, 7, 96), value).bfloat16() for value in (0.5, -0.5)]

    def quantized_scales(text) -> set[AttentionScales | None]:
        kernels.scales.clear()
        run(fused, text)
        assert kernels.scales[0] is kernels.scales[3] is None, "protected blocks stay in BF16"
        return set(kernels.scales[1:3])

    fp8 = set(attention_scales(recipe, fp8_scales).values())
    assert quantized_scales(prompts[0]) == fp8, "a pass of no run is none of the first"
    for _ in range(2):  # a run begins anew
        with denoising_run(fused):
            for step in range(4):
                for text in prompts:
                    assert quantized_scales(text) == ({None} if step < 2 else fp8)
    assert quantized_scales(prompts[0]) == fp8


def test_bits_are_those_of_bf16_attention_first_and_of_fp8_attention_later(
    tiny_transformer, fp8_recipe, fp8_scales
):
    def videos(recipe: QuantRecipe) -> list[torch.Tensor]:
        fused = fused_transformer(tiny_transformer, EagerKernels(), recipe, fp8_scales)
        text = torch.ones(1, 8, 96).bfloat16()
        with denoising_run(fused):
            return [run(fused, text) for _ in range(3)]

    bf16 = videos(dataclasses.replace(fp8_recipe, attention="bf16"))
    fp8 = videos(fp8_recipe)
    assert not torch.equal(bf16[0], fp8[0])
    for steps in (0, 1, 3, 4):
        found = videos(dataclasses.replace(fp8_recipe, attention_bf16_steps=steps))
        assert all(map(torch.equal, found, bf16[:steps] + fp8[steps:]))


def test_scales_do_not_depend_on_the_steps(fp8_recipe, fp8_scales):
    later = dataclasses.replace(fp8_recipe, attention_bf16_steps=2)
    fingerprint = fp8_scales.model_fingerprint
    assert check_scales(fp8_scales, model_fingerprint=fingerprint, recipe=later) == later
    of_later = dataclasses.replace(fp8_scales, recipe=later)
    assert check_scales(of_later, model_fingerprint=fingerprint, recipe=fp8_recipe) == fp8_recipe


def test_scales_that_lack_attention_are_refused(tiny_transformer, fp8_recipe, tiny_scales):
    with pytest.raises(ConversionError, match=r"the first being blocks\.1\.attn1\.q"):
        fused_transformer(tiny_transformer, EagerKernels(), fp8_recipe, tiny_scales)


def test_emulated_attention_is_attention_and_does_not_depend_on_chunks():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, tokens, 16, generator=generator).to(torch.bfloat16)
        for tokens in (50, 70, 70)
    )
    emulated = fp8_attention(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert emulated.shape == exact.shape
    assert sqnr_db(exact, emulated) > 32  # numerators keep three mantissa bits
    # 420 scores per query: eight chunks, the last of one query; sums differ in the last bits.
    for max_scores in (7 * 420, 1):
        assert sqnr_db(emulated, fp8_attention(q, k, v, max_scores)) > 40
