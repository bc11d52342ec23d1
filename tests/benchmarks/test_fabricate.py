"""Test that fabricated folders work with the libraries and are reproducible by seed."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.fixtures.fabricate import FABRICATED, Plan, fabricate
from benchmarks.fixtures.fabricated_weights import OUTLIER_MAX, OUTLIER_MIN, Fabricator
from quant import QuantRecipe, check_scales, load_scales, model_fingerprint

CPU = torch.device("cpu")


def test_the_libraries_load_it_and_it_runs(fabricated):
    pipe = WanPipeline.from_pretrained(fabricated, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a box", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt"
    ).frames
    assert frames.shape == (1, 5, 3, 32, 32)
    assert frames.isfinite().all()
    assert frames.std() > 0


def test_large_parts_are_sharded_as_the_libraries_do(fabricated):
    files = sorted(file.name for file in (fabricated / "transformer").iterdir())
    assert "diffusion_pytorch_model.safetensors.index.json" in files
    assert files[1].startswith("diffusion_pytorch_model-00001-of-0000")
    assert {file.name for file in (fabricated / "text_encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_the_same_seed_gives_the_same_model_whatever_the_threads(fabricated, tmp_path):
    again = tmp_path / "again"
    fabricate(again, Plan("mini", 40, seed=7, threads=1, device=CPU, shard_bytes=400_000))
    assert model_fingerprint(again) == model_fingerprint(fabricated)
    fabricate(tmp_path / "other", Plan("mini", 2, seed=8, threads=1, device=CPU))
    ours, theirs = (
        load_file(each / "text_encoder" / "model.safetensors")["shared.weight"]
        for each in (tmp_path / "other", fabricated)
    )
    assert not torch.equal(ours, theirs)


def test_files_are_marked_as_fabricated(fabricated):
    for file in fabricated.glob("*/*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["fabricated"] == "seed 7, benchmarks.fixtures.fabricate"


def test_a_few_channels_after_norms_are_outliers():
    fabricator = Fabricator("transformer", 0, 40, CPU)
    table = fabricator.make(("blocks.3.scale_shift_table", torch.float32, (1, 6, 1280)))
    factors = 1 + table[0, 1]
    outliers = factors.abs() > OUTLIER_MIN - 0.01
    assert outliers.sum() == 2
    assert factors[outliers].max() <= OUTLIER_MAX
    weight = fabricator.make(("blocks.3.attn1.to_q.weight", torch.float32, (64, 1280)))
    rest = weight[:, ~outliers].std()
    assert weight[:, outliers].std() < rest / 5
    assert weight.abs().max() > 8 * rest, "no heavy tail"
    cross = fabricator.make(("blocks.3.attn2.to_k.weight", torch.float32, (64, 1280)))
    assert cross[:, outliers].std() > rest / 2, "cross-attention's keys get the prompt instead"


def test_scales_are_calibrated_and_name_their_prompts(fabricated, fabricated_scales):
    scales = load_scales(fabricated_scales)
    recipe = QuantRecipe.load("boundary-hif8")
    check_scales(scales, model_fingerprint=model_fingerprint(fabricated), recipe=recipe)
    assert scales.prompts_file == FABRICATED
    assert len(scales.act_scale) == 350


def test_an_incomplete_folder_is_removed(tmp_path):
    with pytest.raises(RuntimeError):
        fabricate(tmp_path / "out", Plan("mini", 1, 0, 1, torch.device("meta")))  # has no numbers
    assert list(tmp_path.iterdir()) == []
