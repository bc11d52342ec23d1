"""A transformer in INT8: its scales, its layers, fused, and packed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from quant import (
    QuantRecipe,
    ScalesMismatch,
    TensorReader,
    check_packed,
    convert,
    load_packed,
    load_scales,
    model_fingerprint,
    open_packed,
    quantize_transformer,
    run_calibration,
    save_scales,
    sqnr_db,
)
from quant.calibration.scales import check_scales
from quant.cli import app
from quant.errors import CalibrationError, ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.int8.product import Int8Product
from quant.numerics.int8_linear import Int8Linear
from quant.transformer.fuse import fuse_quantized
from quant.transformer.meta_model import empty_transformer, load_weights
from quant.transformer.weight_scales import scales_of_weights
from quant.weights.fingerprint import read_transformer_config
from quant.weights.header import stored_tensors
from tests.quant.weights.model_folders import copy_model

CPU = TensorReader(torch.device("cpu"))
KEPT = ("blocks.1.ffn.net.2", "blocks.2.ffn.net.2")
LINEARS = 18


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    data = QuantRecipe.load("boundary-int8").to_dict()
    data |= {"name": "tiny-int8", "total_blocks": 4, "protected_blocks": [0, 3]}
    path = tmp_path_factory.mktemp("recipe") / "tiny-int8.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def recipe(recipe_file) -> QuantRecipe:
    return QuantRecipe.load(recipe_file)


@pytest.fixture(scope="module")
def scales(tiny_model, recipe):
    return scales_of_weights(tiny_model, recipe, torch.device("cpu"))


@pytest.fixture
def bf16(tiny_model):
    transformer = empty_transformer(read_transformer_config(tiny_model))
    stored = stored_tensors((tiny_model / "transformer").glob("*.safetensors"))
    return load_weights(transformer, stored, CPU).eval()


@torch.no_grad()
def run(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return transformer(
        hidden_states=torch.randn(1, 16, 2, 4, 4, generator=generator).to(torch.bfloat16),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, 8, 96, generator=generator).to(torch.bfloat16),
        return_dict=False,
    )[0]


def test_scales_of_the_weights_are_those_of_a_calibration(tiny_pipe, tiny_plan, recipe, scales):
    calibrated = run_calibration(tiny_pipe, replace(tiny_plan, recipe=recipe))
    assert calibrated.act_scale == scales.act_scale == {}
    assert list(calibrated.weight_scale) == list(scales.weight_scale) == list(scales.linears)
    assert len(scales.linears) == LINEARS
    for name, scale in scales.weight_scale.items():
        assert torch.equal(scale, calibrated.weight_scale[name])
    assert torch.equal(scales.weight_amax, calibrated.weight_amax)
    assert scales.num_prompts == 0


def test_calibrate_needs_no_prompts_and_inspect_says_so(tiny_model, tmp_path, recipe_file, scales):
    out = tmp_path / "scales.safetensors"
    options = ("--model", str(tiny_model), "--recipe", str(recipe_file))
    made = CliRunner().invoke(app, ["calibrate", *options, "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert "no prompts were needed" in made.stdout
    read = load_scales(out)
    assert read.sampler is None
    assert all(torch.equal(read.weight_scale[n], s) for n, s in scales.weight_scale.items())
    shown = CliRunner().invoke(app, ["inspect", str(out), *options])
    assert shown.exit_code == 0, shown.output
    for fact in (
        "18 linears in 2 of 4 blocks to int8",
        "linears blocks.*.ffn.net.2",
        "no prompts: these scales come from the weights alone",
        "not seen",
    ):
        assert fact in shown.stdout
    hif8 = CliRunner().invoke(
        app, ["calibrate", "--model", str(tiny_model), "--out", str(tmp_path / "h.safetensors")]
    )
    assert hif8.exit_code == 1
    assert "has static scales of activations" in hif8.stderr
    assert not (tmp_path / "h.safetensors").exists()


def test_a_refusal_recommends_a_command_without_prompts(scales, recipe, tiny_recipe):
    with pytest.raises(ScalesMismatch) as caught:
        check_scales(scales, model_fingerprint="another", recipe=recipe)
    command = str(caught.value).rpartition("-m quant calibrate ")[2]
    assert "--prompts" not in command
    assert "--recipe" in command
    with pytest.raises(ScalesMismatch, match="--prompts PROMPTS_FILE"):
        check_scales(scales, model_fingerprint=scales.model_fingerprint, recipe=tiny_recipe)


def test_weights_that_are_not_finite_stop_it(tiny_model, tmp_path, recipe, bf16, scales):
    model = copy_model(tiny_model, tmp_path / "model")
    bf16.blocks[1].attn1.to_q.weight.data[0, 0] = float("nan")
    bf16.save_pretrained(model / "transformer")
    with pytest.raises(CalibrationError, match=r"weights of blocks\.1\.attn1\.to_q hold NaN"):
        scales_of_weights(model, recipe, torch.device("cpu"))
    with pytest.raises(ConversionError, match=r"weights of blocks\.1\.attn1\.to_q hold NaN"):
        quantize_transformer(bf16, recipe, scales)


def test_the_recipes_linears_are_int8_and_the_others_shared(bf16, recipe, scales):
    quantized, report = quantize_transformer(bf16, recipe, scales)
    converted = {n for n, m in quantized.named_modules() if isinstance(m, Int8Linear)}
    assert converted == set(scales.linears)
    assert not converted & set(KEPT)
    assert quantized.blocks[1].ffn.net[2].weight is bf16.blocks[1].ffn.net[2].weight
    assert str(report).startswith("18 linears in 2 of 4 blocks quantized")
    assert "per token" in report.table()
    assert 20 < sqnr_db(run(bf16), run(quantized)) < 60


def test_fused_is_unfused_to_the_last_bit(bf16, recipe, scales):
    unfused, _ = quantize_transformer(bf16, recipe, scales)
    fused, _ = quantize_transformer(bf16, recipe, scales)
    assert fuse_quantized(fused, EagerKernels(), {}) == ()
    block = fused.blocks[1]
    assert isinstance(block.qkv, Int8Product)
    assert block.qkv.weight.shape == (96, 32)
    assert not isinstance(block.down, Int8Product)
    assert torch.equal(run(fused), run(unfused))


def test_packed_is_quantized_on_the_spot_to_the_last_bit(
    tmp_path, tiny_model, recipe, scales, bf16
):
    save_scales(scales, tmp_path / "scales.safetensors")
    folder = tmp_path / "packed"
    report = convert(tiny_model, recipe, tmp_path / "scales.safetensors", folder)
    assert report.linears == LINEARS
    packed = open_packed(folder)
    check_packed(packed, model_fingerprint=model_fingerprint(tiny_model), recipe=recipe)
    assert packed.linears == LINEARS
    loaded = load_packed(packed, CPU)
    expected, _ = quantize_transformer(bf16, recipe, scales)
    for name, tensor in expected.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype is tensor.dtype, name
        assert torch.equal(found, tensor), name
    assert torch.equal(run(loaded.eval()), run(expected))
    (shard,) = folder.glob("transformer-*")
    with safe_open(shard, "pt") as file:
        assert file.get_tensor("blocks.1.attn1.to_q.weight_qdata").dtype is torch.int8
        assert "blocks.1.attn1.to_q.weight" not in file.keys()  # noqa: SIM118 (not a mapping)
        assert json.loads(file.metadata()["scales_from"])["sampler"] is None
