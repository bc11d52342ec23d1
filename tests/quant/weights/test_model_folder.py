"""What is no Wan2.1 text-to-video pipeline is refused by its name, by all who open a folder."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from quant.calibration.sampling import load_pipeline
from quant.calibration.scales import save_scales
from quant.cli import app
from quant.errors import QuantError, WeightsError
from quant.packed.convert import convert
from quant.weights.fingerprint import model_fingerprint
from quant.weights.model_folder import check_model_kind
from tests.quant.weights.model_folders import (
    copy_model,
    original_name,
    rename_weights,
    update_json,
)
from worker.errors import ModelUnusable
from worker.model_loader.mode_plan import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 57\n"
INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
VACE = ["diffusers", "WanVACETransformer3DModel"]

OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "two experts": (INDEX, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan2.2"),
    "one expert": (INDEX, {"boundary_ratio": 0.875}, "two experts of Wan2.2"),
    "ti2v": (INDEX, {"expand_timesteps": True}, "Wan2.2 TI2V-5B"),
    "i2v": (INDEX, {"_class_name": "WanImageToVideoPipeline"}, "image-to-video pipeline"),
    "v2v": (INDEX, {"_class_name": "WanVideoToVideoPipeline"}, "video-to-video pipeline"),
    "vace": (INDEX, {"_class_name": "WanVACEPipeline"}, "VACE pipeline"),
    "animate": (INDEX, {"_class_name": "WanAnimatePipeline"}, "animates characters"),
    "flux": (INDEX, {"_class_name": "FluxPipeline"}, "holds a FluxPipeline:"),
    "no class": (INDEX, {"_class_name": None}, "without a _class_name"),
    "image encoder": (INDEX, {"image_encoder": ["transformers", "CLIPVisionModel"]}, "image-to-"),
    "vace transformer": (INDEX, {"transformer": VACE}, "VACE transformer"),
    "vace config": (TRANSFORMER, {"_class_name": VACE[1]}, "VACE transformer"),
    "vace layers": (TRANSFORMER, {"vace_layers": [0, 5]}, "VACE transformer"),
    "36 channels": (TRANSFORMER, {"in_channels": 36}, "image-to-video .*in_channels 36"),
    "image dim": (TRANSFORMER, {"image_dim": 1280}, "image-to-video .*image_dim 1280"),
    "kv": (TRANSFORMER, {"added_kv_proj_dim": 5120}, "image-to-video .*added_kv_proj_dim 5120"),
    "flf2v": (TRANSFORMER, {"pos_embed_seq_len": 514}, "image-to-video"),
    "48 channels": (TRANSFORMER, {"in_channels": 48, "out_channels": 48}, "Wan2.2 TI2V-5B"),
    "original i2v": (TRANSFORMER, {"_class_name": "WanModel", "model_type": "i2v"}, "image-to-"),
    "vae 2.2": (VAE, {"is_residual": True}, "VAE of Wan2.2"),
    "another vae": (VAE, {"_class_name": "AutoencoderKL"}, "VAE of the class AutoencoderKL"),
}


@pytest.fixture
def model(tmp_path, tiny_model):
    return copy_model(tiny_model, tmp_path / "model")


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_model_is_refused_everywhere(
    kind, model, tmp_path, tiny_recipe, tiny_scales
):
    file, values, message = OTHERS[kind]
    update_json(model / file, **values)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(8)))
    check_refusal(lambda: check_folder(model), ModelUnusable, message)
    check_refusal(lambda: load_pipeline(model, "cpu"), QuantError, message)
    check_refusal(
        lambda: convert(model, tiny_recipe, tmp_path / "s", tmp_path / "o"), QuantError, message
    )
    if kind not in ("two experts", "36 channels"):  # the others take the same way
        return
    out, prompts = str(tmp_path / "new"), ["--prompts", str(tmp_path / "prompts.txt")]
    save_scales(tiny_scales, tmp_path / "scales")
    for command in (
        ["calibrate", *prompts, "--out", out],
        ["preview-map", *prompts, "--out", out],
        ["record", *prompts, "--out", out],
        ["convert", "--scales", str(tmp_path / "scales"), "--out", out],
        ["inspect", str(tmp_path / "scales")],
        ["analyze", "--points", out, "--out", out],
        ["ablate", "--points", out, "--analysis", out, "--out", out],
    ):
        result = CliRunner().invoke(app, [*command, "--model", str(model)])
        assert result.exit_code == 1, command
        assert re.search(message, result.stderr), command
        assert not Path(out).exists()


def check_refusal(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "only Wan2.1 text-to-video is served" in str(caught.value)


@pytest.mark.parametrize("part", ["transformer_2", "image_encoder"])
def test_a_part_of_another_model_shows_it_though_the_index_does_not(model, part):
    (model / part).mkdir()
    (model / part / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=part):
        check_model_kind(model)


@pytest.mark.parametrize("name", [INDEX, VAE, "tokenizer/tokenizer.json", "tokenizer/x.model"])
def test_a_pointer_in_any_part_is_named(model, name):
    (model / name).write_text(POINTER)
    with pytest.raises(WeightsError, match=rf"{model / name} is a Git LFS pointer"):
        check_model_kind(model)


def store(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, file)
    return file


def original_repository(folder: Path, model_type: str) -> Path:
    """Wan-AI/Wan2.1-T2V-14B, by its names."""
    shard = "diffusion_pytorch_model-00001-of-00006.safetensors"
    store(folder / shard, "blocks.0.self_attn.q.weight", "text_embedding.0.weight")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"x")
    return folder


def test_the_original_repository_is_refused_with_the_command(tmp_path):
    folder = original_repository(tmp_path / "Wan2.1-T2V-14B", "t2v")
    with pytest.raises(ModelUnusable, match="layout of Wan's original repository") as caught:
        check_folder(folder)
    assert f"python -m quant import --from {folder} --out NEW_FOLDER" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"), [("i2v", "image-to-video"), ("vace", "VACE"), ("ti2v", "Wan2.2")]
)
def test_another_original_repository_is_refused_by_name(tmp_path, model_type, name):
    with pytest.raises(WeightsError, match=name):
        check_model_kind(original_repository(tmp_path / "repository", model_type))


def test_the_original_repository_of_wan22_is_refused_by_name(tmp_path):
    for expert in ("high_noise_model", "low_noise_model"):
        original_repository(tmp_path / expert, "t2v")
    with pytest.raises(WeightsError, match=r"Wan2\.2 with two experts \(high_noise_model, low"):
        check_model_kind(tmp_path)


LOOSE = {
    "comfy": ("model.diffusion_model.blocks.0.self_attn.q.weight", "ComfyUI's layout .* import"),
    "comfy short": ("diffusion_model.head.head.weight", "ComfyUI's layout .* quant import --from"),
    "lora": ("blocks.0.self_attn.q.lora_A.weight", "LoRA"),
    "lora of kohya": ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "LoRA"),
    "fp8": ("blocks.0.self_attn.q.scale_weight", "weights in 8 bits with scales"),
    "vae": ("decoder.middle.0.residual.0.gamma", "VAE in the layout of Wan's .* take the folder"),
    "encoder": ("blocks.0.attn.q.weight", "text encoder in the layout of Wan's original"),
}


@pytest.mark.parametrize("layout", LOOSE)
def test_a_single_file_is_refused_by_its_layout(tmp_path, layout):
    name, message = LOOSE[layout]
    file = store(tmp_path / "some.safetensors", name)
    for path in (file, tmp_path):
        with pytest.raises(WeightsError, match=message):
            check_model_kind(path)


@pytest.mark.parametrize("name", ["wan.gguf", "wan.pth"])
def test_other_single_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=f"{name} is not read here: give a pipeline's folder"):
        check_model_kind(tmp_path / name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_weights_in_the_original_layout_beside_a_fitting_configuration(
    model, tmp_path, tiny_recipe, scales_of, prefix
):
    rename_weights(
        model / "transformer",
        lambda tensors: {f"{prefix}{original_name(n)}": each for n, each in tensors.items()},
    )
    scales = scales_of(model, tmp_path)
    with pytest.raises(
        WeightsError, match=r"has .* layout .* convert it with: python -m quant imp"
    ):
        convert(model, tiny_recipe, scales, tmp_path / "out")


@pytest.fixture
def scales_of(tiny_scales):
    def make(model: Path, folder: Path) -> Path:
        file = folder / "scales.safetensors"
        save_scales(replace(tiny_scales, model_fingerprint=model_fingerprint(model)), file)
        return file

    return make


def test_a_configuration_of_the_original_repository_is_refused_with_the_command(model):
    update_json(model / TRANSFORMER, _class_name="WanModel", model_type="t2v")
    with pytest.raises(
        WeightsError, match=r"\(WanModel\): convert the transformer with: python -m"
    ):
        check_model_kind(model)
