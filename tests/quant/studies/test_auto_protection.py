"""Test recipes with `protect = "auto"`: from an analysis to scales, and to all who load them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.calibration.scales import Scales, check_scales, load_scales, save_scales
from quant.calibration.summary import describe_scales
from quant.errors import PackedMismatch, QuantError, RecipeError, ScalesError, ScalesMismatch
from quant.packed.load import check_packed, open_packed
from quant.recipe.evidence import BlockEnergy, ProtectionEvidence, measured_recipe
from quant.recipe.recipe import QuantRecipe
from quant.studies.output.study_folder import read_results
from quant.studies.protection.proposal import read_evidence
from quant.weights.fingerprint import model_fingerprint
from tests.quant.conftest import BLOCKS, PROMPTS
from tests.quant.studies.conftest import CALIBRATION, HELD_OUT, run

SMALL = ("--steps", "4", "--size", "32x32", "--frames", "1", "--text-tokens", "16")


@pytest.fixture(scope="module")
def analysis(
    tiny_model: Path, recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Analyze with the open recipe itself; block 0 is not among the proposed."""
    out = tmp_path_factory.mktemp("auto") / "analysis"
    result = run(
        *("analyze", "--model", tiny_model, "--points", recorded["calibration"], "--out", out),
        *("--recipe", "auto-hif8", "--points-per-prompt", "1", "--linear-points", "2"),
    )
    assert result.exit_code == 0, result.output
    return out


def calibrate(model: Path, folder: Path, out: Path, *options: str | Path) -> Any:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:8]))
    return run(
        *("calibrate", "--model", model, "--prompts", prompts, "--out", out),
        *("--recipe", "auto-hif8", *SMALL, *options),
    )


@pytest.fixture(scope="module")
def scales_file(tiny_model: Path, analysis: Path) -> Path:
    out = analysis.parent / "auto.safetensors"
    result = calibrate(tiny_model, analysis.parent, out, "--analysis", analysis)
    assert result.exit_code == 0, result.output
    return out


def test_the_scales_hold_the_blocks_and_the_evidence_for_them(
    scales_file: Path, analysis: Path, tiny_model: Path
) -> None:
    results = read_results(analysis, "analyze")
    scales = load_scales(scales_file)
    evidence = scales.protection
    assert evidence is not None
    assert list(scales.recipe.protected_blocks) == results["proposed"] == list(evidence.blocks)
    assert scales.recipe.total_blocks == BLOCKS == len(evidence.energy)
    assert len(scales.linears) == 10 * (BLOCKS - len(evidence.blocks))
    means = [results["blocks"][str(block)]["mean"] for block in range(BLOCKS)]
    assert [each.mean for each in evidence.energy] == means
    assert evidence.ranking == tuple(sorted(range(BLOCKS), key=lambda block: -means[block]))
    assert evidence.removed == pytest.approx(results["energy_removed"]["proposed"])
    assert evidence.budget == {"count": 2}
    assert (evidence.prompts, evidence.points) == (8, 8)
    assert evidence.options["linear_points"] == 2
    assert ProtectionEvidence.from_json(evidence.to_json()) == evidence
    listed = QuantRecipe.load(analysis / "recipe.toml")
    assert listed.fingerprint == scales.recipe.fingerprint
    assert check_scales(
        scales,
        model_fingerprint=model_fingerprint(tiny_model),
        recipe=QuantRecipe.load("auto-hif8"),
    ).protected_blocks == tuple(results["proposed"])


def test_inspect_shows_the_evidence_and_that_the_open_recipe_fits(
    scales_file: Path, tiny_model: Path
) -> None:
    told = run("inspect", scales_file, "--model", tiny_model, "--recipe", "auto-hif8").stdout
    evidence = load_scales(scales_file).protection
    assert evidence is not None
    assert f"analysis sha256:{evidence.analysis_sha256} on 8 points of 8 prompts" in told
    assert f"sha256:{evidence.points_sha256}" in told
    assert f"count 2; these blocks have {evidence.removed:.1%} of the error energy" in told
    assert "fits recipe auto-hif8" in told
    first = told.partition("its ranking")[2].split()[0]
    assert first == str(evidence.ranking[0])


def test_linears_that_a_recipe_keeps_are_no_part_of_its_analysis(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "kept.json", tmp_path / "analysis"
    kept = ["blocks.*.ffn.net.2", "blocks.3.*"]
    recipe.write_text(json.dumps(QuantRecipe.load("auto-hif8").to_dict() | {"kept_linears": kept}))
    result = run(
        *("analyze", "--model", tiny_model, "--points", recorded["calibration"], "--out", out),
        *("--recipe", recipe, "--points-per-prompt", "1", "--linear-points", "2"),
    )
    assert result.exit_code == 0, result.output
    found, whole = read_results(out, "analyze"), read_results(analysis, "analyze")
    assert len(found["linears"]) == 9 * (BLOCKS - 1)
    assert not any("ffn.net.2" in name or "blocks.3." in name for name in found["linears"])
    energy = [[each["blocks"][str(b)]["mean"] for b in range(BLOCKS)] for each in (found, whole)]
    assert energy[0][3] == 0
    assert all(left < quantized for left, quantized in zip(*energy, strict=True))
    words = "auto-hif8, which keeps blocks.*.ffn.net.2, blocks.3.* in BF16"
    assert words in (out / "index.html").read_text()

    ablation = tmp_path / "ablation"
    result = run(
        *("ablate", "--model", tiny_model, "--points", recorded["held-out"], "--analysis", out),
        *("--recipe", recipe, "--random-sets", "0", "--points-per-prompt", "1"),
        *("--out", ablation),
    )
    assert result.exit_code == 0, result.output
    assert not any("ffn.net.2" in name for name in read_results(ablation, "ablate")["sets"])
    assert words in (ablation / "index.html").read_text()

    scales_file = tmp_path / "auto.safetensors"
    refused = calibrate(tiny_model, tmp_path, scales_file, "--analysis", out)
    assert "measured another format, other scales or other linears" in refused.output
    evidence = read_evidence(out, model_fingerprint(tiny_model))
    assert evidence.resolve(QuantRecipe.load(recipe)).protected_blocks == evidence.blocks


def test_inspect_says_that_kept_linears_are_not_in_the_ranking(scales_file: Path) -> None:
    scales = load_scales(scales_file)
    assert "quantized alone\n" in describe_scales(scales, scales_file)
    kept = replace(scales.recipe, kept_linears=("blocks.*.ffn.net.2",))
    told = describe_scales(replace(scales, recipe=kept), scales_file)
    assert "quantized alone\n" in told, "of an older analysis, which quantized them"
    assert scales.protection is not None
    measured = measured_recipe(kept, BLOCKS).fingerprint
    evidence = replace(scales.protection, recipe=measured)
    told = describe_scales(replace(scales, recipe=kept, protection=evidence), scales_file)
    assert "quantized alone, but for the linears that it keeps in BF16\n" in told


def test_a_file_that_holds_evidence_can_be_made_again_without_the_analysis(
    scales_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copy(scales_file, tmp_path / "auto.safetensors"))
    result = calibrate(tiny_model, tmp_path, again)
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == scales_file.read_bytes()


def test_convert_and_evaluate_take_the_blocks_of_the_scales(
    scales_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    packed, fingerprint = tmp_path / "packed", model_fingerprint(tiny_model)
    result = run("convert", "--model", tiny_model, "--scales", scales_file, "--out", packed)
    assert "ask for their recipe (add --recipe auto-hif8, or name it in" in result.output
    result = run(
        *("convert", "--model", tiny_model, "--scales", scales_file, "--out", packed),
        *("--recipe", "auto-hif8"),
    )
    assert result.exit_code == 0, result.output
    found, scales = open_packed(packed), load_scales(scales_file)
    assert found.info.recipe.fingerprint == scales.recipe.fingerprint
    open_recipe = QuantRecipe.load("auto-hif8")
    used = check_packed(found, model_fingerprint=fingerprint, recipe=open_recipe)
    assert used.protected_blocks == scales.recipe.protected_blocks
    larger = replace(open_recipe, total_blocks=40)
    with pytest.raises(PackedMismatch, match="is for 40 blocks, the analysis is of a model with 4"):
        check_packed(found, model_fingerprint=fingerprint, recipe=larger)
    for name, prompts in (("held-out", HELD_OUT), ("choosing", CALIBRATION)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    words: tuple[str | Path, ...] = ("evaluate", "--model", tiny_model)
    words += ("--candidate", f"auto={scales_file}")
    words += ("--judge", "latent-sqnr", "--steps", "1", *SMALL[2:], "--out", tmp_path / "out")
    given: tuple[str | Path, ...]
    given = ("--calibration-prompts", scales_file.parent / "prompts.txt")
    refused = run(*words, *given, "--prompts", tmp_path / "choosing.txt")
    assert "the very prompts that chose the protected blocks of auto" in refused.output
    refused = run(*words, *given, "--prompts", tmp_path / "held-out.txt")
    assert "the prompts that chose the protected blocks of auto, " in refused.output
    assert "are not to be found" in refused.output
    given += ("--calibration-prompts", tmp_path / "choosing.txt", "--batch", "3")
    result = run(*words, *given, "--prompts", tmp_path / "held-out.txt")
    assert result.exit_code == 0, result.output


def test_an_open_recipe_is_refused_where_nothing_says_its_blocks(
    tiny_model: Path, analysis: Path, tiny_scales: Scales, tmp_path: Path
) -> None:
    out = tmp_path / "scales.safetensors"
    result = calibrate(tiny_model, tmp_path, out)
    assert result.exit_code == 1
    assert "`python -m quant analyze` and `python -m quant calibrate --analysis" in result.output
    assert not out.exists()
    words = ("--recipe", "boundary-hif8", "--analysis", analysis)
    result = calibrate(tiny_model, tmp_path, out, *words)
    assert result.exit_code == 1
    assert "recipe 'boundary-hif8' lists its protected blocks" in result.output
    save_scales(tiny_scales, out)  # of a recipe that lists them
    open_recipe = QuantRecipe.load("auto-hif8")
    with pytest.raises(ScalesMismatch, match=r"hold no analysis .* --analysis ANALYSIS_FOLDER"):
        check_scales(
            load_scales(out), model_fingerprint=tiny_scales.model_fingerprint, recipe=open_recipe
        )
    with pytest.raises(RecipeError, match="protect = 'auto', so that only an analysis"):
        _ = open_recipe.quantized_blocks


def test_an_analysis_that_does_not_fit_is_refused(
    tiny_model: Path, analysis: Path, tmp_path: Path
) -> None:
    out, fingerprint = tmp_path / "scales.safetensors", model_fingerprint(tiny_model)
    other = Path(shutil.copytree(analysis, tmp_path / "other"))
    state = json.loads((other / "study.json").read_text())
    state["identity"]["model"] = "sha256-full-v2:0"
    (other / "study.json").write_text(json.dumps(state))
    result = calibrate(tiny_model, tmp_path, out, "--analysis", other)
    assert "is of another model: analyze this one first" in result.output
    shutil.copy(analysis / "study.json", other / "study.json")
    edited = tmp_path / "edited.toml"
    for before, after in (
        (other / "recipe.toml", other / "recipe.toml"),  # which does not change what was measured
        (Path("quant/recipe/presets/auto-hif8.toml"), edited),
    ):
        text = before.read_text()
        assert 'policy = "pow2"' in text
        after.write_text(text.replace('policy = "pow2"', 'policy = "amax15"'))
    result = calibrate(tiny_model, tmp_path, out, "--analysis", other, "--recipe", edited)
    assert "measured another format, other scales or other linears" in result.output
    results = json.loads((other / "results.json").read_text())
    for wrong, message in (
        (results | {"blocks": {}}, f"{other} is damaged: analyze again"),
        ({k: each for k, each in results.items() if k != "measured_recipe"}, "by an older version"),
    ):
        (other / "results.json").write_text(json.dumps(wrong))
        assert message in calibrate(tiny_model, tmp_path, out, "--analysis", other).output
    evidence = read_evidence(analysis, fingerprint)
    larger = replace(QuantRecipe.load("auto-hif8"), total_blocks=40)
    with pytest.raises(RecipeError, match="is for 40 blocks, the analysis is of a model with 4"):
        evidence.resolve(larger)
    assert not out.exists()


def test_attention_and_what_is_said_for_people_do_not_matter_to_an_analysis() -> None:
    recipe = replace(QuantRecipe.load("auto-hif8"), attention="fp8", description="another")
    energy = tuple(BlockEnergy(each, each, each) for each in (0.1, 0.4, 0.2))
    measured = measured_recipe(QuantRecipe.load("auto-hif8"), 3).fingerprint
    evidence = ProtectionEvidence(
        *("model", measured, (1,), energy, {"count": 1}, 8, 16, "p.txt", "", "", "", {}, "1")
    )
    resolved = evidence.resolve(recipe)
    assert (resolved.protected_blocks, resolved.total_blocks) == ((1,), 3)
    assert resolved.attention == "fp8"
    with pytest.raises(RecipeError, match="other linears than those of recipe 'auto-hif8'"):
        evidence.resolve(replace(recipe, kept_linears=("blocks.*.ffn.net.2",)))
    assert evidence.ranking == (1, 2, 0)
    assert evidence.resolve(resolved) == resolved
    with pytest.raises(ValueError, match=r"blocks \[3\] are not some of 3"):
        replace(evidence, blocks=(3,))


def test_scales_whose_recipe_and_evidence_differ_are_no_scales_file(
    scales_file: Path, tmp_path: Path
) -> None:
    scales = load_scales(scales_file)
    assert scales.protection is not None
    wrong = replace(scales.protection, blocks=(0,))
    save_scales(replace(scales, protection=wrong), tmp_path / "s.safetensors")
    with pytest.raises(ScalesError, match=r"the analysis in it has chosen \[0\]"):
        load_scales(tmp_path / "s.safetensors")
    of_another = replace(scales.protection, model_fingerprint="sha256-full-v2:0")
    save_scales(replace(scales, protection=of_another), tmp_path / "s.safetensors")
    with pytest.raises(ScalesError, match="the analysis in it of sha256-full-v2:0"):
        load_scales(tmp_path / "s.safetensors")


def test_protect_has_one_value_and_goes_with_no_list(recipe_dict: dict[str, Any]) -> None:
    open_dict = {name: each for name, each in recipe_dict.items() if name != "protected_blocks"}
    found = QuantRecipe.from_dict(open_dict | {"protect": "auto"})
    assert found.is_auto
    assert QuantRecipe.from_json(found.to_json()) == found
    del open_dict["total_blocks"]
    assert QuantRecipe.from_dict(open_dict | {"protect": "auto"}).total_blocks == 0
    for changes, message in (
        ({"protect": "ends"}, "protect 'ends' is not 'auto'"),
        ({"protect": "auto", "protected_blocks": [0]}, "either protected_blocks or protect"),
        ({}, "recipe lacks protected_blocks, total_blocks"),
    ):
        with pytest.raises(QuantError, match=message):
            QuantRecipe.from_dict(open_dict | changes)
