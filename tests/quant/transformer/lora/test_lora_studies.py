"""Studies of a model with LoRAs: they measure the merged model, and are no other model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant import LoraSource, Scales, model_fingerprint, read_loras, save_scales
from quant.studies.commands.options import load_transformer
from quant.studies.points import open_points
from tests.quant.conftest import PROMPTS
from tests.quant.studies.conftest import run
from tests.quant.transformer.lora.lora_files import by_diffusers, random_factors, save_merged

SMALL = (
    "--steps",
    4,
    "--keep",
    2,
    "--guidance-scale",
    1,
    "--frames",
    1,
    "--size",
    "32x32",
    "--text-tokens",
    16,
)


@pytest.fixture
def lora(tiny_transformer: Any, tmp_path: Path) -> Path:
    return by_diffusers(tmp_path, random_factors(tiny_transformer.state_dict()))


def test_record_runs_the_merged_model(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    """As it runs a model whose files hold the merged weights."""
    loras = read_loras(tiny_model, [LoraSource(lora, 0.5)])
    merged = save_merged(tiny_model, tmp_path / "merged", loras)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:8]))
    found = []
    for model, option in ((tiny_model, ("--lora", f"{lora}:0.5")), (merged, ())):
        out = tmp_path / f"points-of-{model.name}"
        words = ("--model", model, "--prompts", tmp_path / "prompts.txt", "--out", out)
        result = run("record", *words, *SMALL, *option)
        assert result.exit_code == 0, result.output
        found.append(open_points(out))
    for one, other in zip(*(each.of_prompt(1) for each in found), strict=True):
        assert torch.equal(one.latents, other.latents)
    assert found[0].info.model == loras.fingerprint(model_fingerprint(tiny_model))

    points = ("--points", found[0].path, "--out", tmp_path / "analysis")
    refused = run("analyze", "--model", tiny_model, *points)
    assert refused.exit_code == 1
    assert "another model" in refused.stderr


def test_the_other_studies_load_the_merged_transformer(
    tiny_model: Path, lora: Path, tmp_path: Path
) -> None:
    loras = read_loras(tiny_model, [LoraSource(lora)])
    merged = load_transformer(save_merged(tiny_model, tmp_path / "merged", loras)).state_dict()
    found = load_transformer(tiny_model, loras).state_dict()
    assert all(torch.equal(found[name], merged[name]) for name in merged)
    assert not torch.equal(load_transformer(tiny_model).proj_out.weight, found["proj_out.weight"])


def test_evaluate_makes_the_videos_of_the_merged_model(
    tiny_model: Path, lora: Path, tiny_scales: Scales, tmp_path: Path
) -> None:
    """In BF16 and by a candidate, as of a model whose files hold the merged weights."""
    loras = read_loras(tiny_model, [LoraSource(lora, 0.5)])
    merged = save_merged(tiny_model, tmp_path / "merged", loras)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))  # which the scales have seen
    (tmp_path / "unseen.txt").write_text("\n".join(f"the {letter}" for letter in "abcdefgh"))
    made, short = [], ("--steps", 2, *SMALL[4:])
    of_loras = loras.fingerprint(model_fingerprint(tiny_model))
    for model, fingerprint, option in (
        (tiny_model, of_loras, ("--lora", f"{lora}:0.5")),
        (merged, model_fingerprint(merged), ()),
    ):
        file, out = tmp_path / f"{model.name}.safetensors", tmp_path / f"videos-of-{model.name}"
        save_scales(replace(tiny_scales, model_fingerprint=fingerprint), file)
        words = ("--model", model, "--prompts", tmp_path / "unseen.txt", "--out", out)
        judged = ("--candidate", f"w8a8={file}", "--judge", "latent-sqnr")
        result = run("evaluate", *words, *judged, *short, *option)
        assert result.exit_code == 0, result.output
        videos = sorted((out / "videos").rglob("*.safetensors"))
        made.append([each.read_bytes() for each in videos])
    assert len(made[0]) == 16
    assert made[0] == made[1]

    words = ("--model", tiny_model, "--prompts", tmp_path / "unseen.txt", "--out", tmp_path / "no")
    candidate = ("--candidate", tmp_path / f"{tiny_model.name}.safetensors")
    refused = run("evaluate", *words, *candidate, *short)
    assert refused.exit_code == 1
    assert "and it has no LoRA here" in " ".join(refused.stderr.split())
    assert not (tmp_path / "no").exists()
