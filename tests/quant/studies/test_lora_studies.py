"""Studies of a model with LoRAs: they measure the merged model, and are no other model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant import LoraSource, model_fingerprint, read_loras
from quant.studies.output.study_folder import read_results
from quant.studies.points import open_points
from tests.quant.lora.lora_files import by_diffusers, random_factors
from tests.quant.studies.conftest import run
from tests.quant.weights.model_folders import copy_model, rename_weights

SMALL = ("--steps", 2, "--keep", 2, "--frames", 1, "--size", "32x32", "--text-tokens", 16)


@pytest.fixture
def lora(tiny_transformer: Any, tmp_path: Path) -> Path:
    return by_diffusers(tmp_path, random_factors(tiny_transformer.state_dict()))


def test_record_and_analyze_measure_the_merged_model(
    tiny_model: Path, lora: Path, tmp_path: Path
) -> None:
    """As they measure a model whose files hold the merged weights."""
    loras = read_loras(tiny_model, [LoraSource(lora, 0.5)])
    merged = copy_model(tiny_model, tmp_path / "merged")
    rename_weights(
        merged / "transformer",
        lambda tensors: {name: loras.merged(name, each) for name, each in tensors.items()},
    )
    (tmp_path / "prompts.txt").write_text("a red a\na blue b")
    found = []
    for model, option in ((tiny_model, ("--lora", f"{lora}:0.5")), (merged, ())):
        points, out = (tmp_path / f"{model.name}-{kind}" for kind in ("points", "analysis"))
        words: tuple[object, ...] = (
            "--model",
            model,
            "--prompts",
            tmp_path / "prompts.txt",
            "--out",
            points,
        )
        result = run("record", *words, *SMALL, *option)
        assert result.exit_code == 0, result.output
        words = ("analyze", "--model", model, "--points", points, "--out", out)
        few = ("--recipe", "auto-hif8", "--points-per-prompt", 1, "--linear-points", 2)
        result = run(*words, *few, *option)
        assert result.exit_code == 0, result.output
        found.append((open_points(points), read_results(out, "analyze")))
    (ours, results), (theirs, others) = found
    for one, other in zip(ours.of_prompt(1), theirs.of_prompt(1), strict=True):
        assert torch.equal(one.latents, other.latents)
    assert results["blocks"] == others["blocks"]
    assert ours.info.model == loras.fingerprint(model_fingerprint(tiny_model))

    points = tmp_path / f"{tiny_model.name}-points"
    words = ("analyze", "--model", tiny_model, "--points", points, "--out", tmp_path / "x")
    refused = run(*words)
    assert refused.exit_code == 1
    assert "another model" in refused.stderr
