"""Scales and packed checkpoints of a model with LoRAs: made with them, and refused without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant import (
    LoraSource,
    PackedMismatch,
    QuantRecipe,
    Scales,
    ScalesMismatch,
    TensorReader,
    check_packed,
    check_scales,
    convert,
    load_packed,
    load_scales,
    model_fingerprint,
    open_packed,
    quantize_transformer,
    read_loras,
    save_scales,
)
from quant.cli import app
from quant.transformer.meta_model import empty_transformer, load_weights
from quant.weights.fingerprint import read_transformer_config
from quant.weights.header import stored_tensors
from tests.quant.conftest import PROMPTS
from tests.quant.transformer.lora.lora_files import by_diffusers, random_factors, save_merged

CPU = TensorReader(torch.device("cpu"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_model) -> Path:
    (file,) = (tiny_model / "transformer").glob("*.safetensors")
    return by_diffusers(tmp_path_factory.mktemp("lora"), random_factors(load_file(file)))


@pytest.fixture(scope="module")
def loras(lora, tiny_model):
    return read_loras(tiny_model, [LoraSource(lora, 0.5)])


@pytest.fixture(scope="module")
def scales(tiny_scales, loras):
    fingerprint = loras.fingerprint(tiny_scales.model_fingerprint)
    return replace(tiny_scales, model_fingerprint=fingerprint)


@pytest.fixture(scope="module")
def scales_file(tmp_path_factory, scales) -> Path:
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    save_scales(scales, path)
    return path


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_packed_checkpoint_has_them_in_it(
    tiny_model, tiny_recipe, loras, scales, scales_file, tmp_path
):
    convert(tiny_model, tiny_recipe, scales_file, tmp_path / "packed", loras=loras)
    packed = open_packed(tmp_path / "packed")
    made_for = loras.fingerprint(model_fingerprint(tiny_model))
    check_packed(packed, model_fingerprint=made_for, recipe=tiny_recipe)
    found = load_packed(packed, CPU).state_dict()
    bf16 = empty_transformer(read_transformer_config(tiny_model))
    stored = stored_tensors((tiny_model / "transformer").glob("*.safetensors"))
    loras.merge(load_weights(bf16, stored, CPU))
    expected = quantize_transformer(bf16, tiny_recipe, scales)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    with pytest.raises(PackedMismatch) as caught:
        check_packed(packed, model_fingerprint=model_fingerprint(tiny_model), recipe=tiny_recipe)
    digest = loras.digest[:12]
    assert f"was made of this model with the LoRAs {digest}, and it has no" in str(caught.value)
    other = read_loras(tiny_model, [replace(loras.loras[0].source, scale=2.0)])
    with pytest.raises(PackedMismatch, match=r"has the LoRAs [0-9a-f]{12} here; make") as caught:
        check_packed(
            packed,
            model_fingerprint=other.fingerprint(model_fingerprint(tiny_model)),
            recipe=tiny_recipe,
            model_folder=tiny_model,
            loras=other.arguments,
        )
    assert f"--lora {other.loras[0].source.path}:2.0 " in str(caught.value)


def test_scales_of_other_loras_are_refused_with_the_command(
    tiny_model, tiny_recipe, tiny_scales, loras, scales_file, tmp_path
):
    with pytest.raises(ScalesMismatch, match=r"with the LoRAs \w+, and it has no LoRA here"):
        convert(tiny_model, tiny_recipe, scales_file, tmp_path / "packed")
    save_scales(tiny_scales, tmp_path / "plain.safetensors")
    with pytest.raises(ScalesMismatch, match="on this model with no LoRA, and it has") as caught:
        convert(
            tiny_model, tiny_recipe, tmp_path / "plain.safetensors", tmp_path / "out", loras=loras
        )
    command = str(caught.value).rpartition("-m quant calibrate ")[2]
    assert f"--lora {loras.arguments[0]} " in command
    assert not (tmp_path / "out").exists()
    with pytest.raises(ScalesMismatch, match=r"on model sha256.* this model is other\+loras"):
        check_scales(tiny_scales, model_fingerprint=loras.fingerprint("other"), recipe=tiny_recipe)


def test_the_commands_take_them(tiny_model, lora, loras, tmp_path):
    """Of a recipe whose scales come from the weights, so that nothing is run."""
    data = QuantRecipe.load("boundary-int8").to_dict()
    data |= {"name": "tiny-int8", "total_blocks": 4, "protected_blocks": [0, 3]}
    recipe, out = tmp_path / "recipe.json", tmp_path / "scales.safetensors"
    recipe.write_text(json.dumps(data))
    of = ("--model", tiny_model, "--recipe", recipe)
    with_lora = ("--lora", f"{lora}:0.5")
    made = run("calibrate", *of, *with_lora, "--out", out)
    assert made.exit_code == 0, made.output
    found = load_scales(out)
    assert found.model_fingerprint == loras.fingerprint(model_fingerprint(tiny_model))
    plain = run("calibrate", *of, "--out", tmp_path / "plain.safetensors")
    assert plain.exit_code == 0, plain.output
    before = load_scales(tmp_path / "plain.safetensors")
    changed = {
        linear
        for linear, scale in found.weight_scale.items()
        if not torch.equal(scale, before.weight_scale[linear])
    }
    linears = {name.removesuffix(".weight") for name in loras.changed}
    assert changed == linears & set(found.weight_scale) != set()

    shown = run("inspect", out, *of, *with_lora)
    assert shown.exit_code == 0, shown.output
    assert f"+loras-sha256-v1:{loras.digest}" in shown.stdout
    refused = run("inspect", out, *of)
    assert refused.exit_code == 1
    assert "and it has no LoRA here" in refused.stderr
    assert run("inspect", out, *with_lora).exit_code == 2

    packed = tmp_path / "packed"
    assert run("convert", *of, "--scales", out, "--out", packed).exit_code == 1
    done = run("convert", *of, *with_lora, "--scales", out, "--out", packed)
    assert done.exit_code == 0, done.output
    assert open_packed(packed).info.model_fingerprint == found.model_fingerprint
    bad = run("convert", *of, "--lora", tmp_path / "none", "--scales", out, "--out", packed)
    assert bad.exit_code == 1
    assert "there is no LoRA" in bad.stderr


def test_calibrate_runs_the_merged_model(tiny_model, tiny_recipe, loras, lora, tmp_path):
    """Its scales are those of a model whose files hold the merged weights."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:8]))
    (tmp_path / "recipe.json").write_text(tiny_recipe.to_json())
    (tmp_path / "preview-map.json").write_text("so that none is fitted")
    model = save_merged(tiny_model, tmp_path / "model", loras)
    found: list[Scales] = []
    for folder, more in ((tiny_model, ["--lora", f"{lora}:0.5"]), (model, [])):
        out = tmp_path / f"{len(found)}.safetensors"
        words = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--out", out, *more]
        words += [
            "--recipe",
            tmp_path / "recipe.json",
            "--size",
            "32x32",
            "--frames",
            1,
            "--guidance-scale",
            1,
        ]
        result = run("calibrate", *words, "--steps", 4, "--text-tokens", 16)
        assert result.exit_code == 0, result.output
        found.append(load_scales(out))
    merged, on_disk = found
    assert torch.equal(merged.act_amax, on_disk.act_amax)
    assert torch.equal(merged.weight_amax, on_disk.weight_amax)
