"""Test compare-methods and inject-outliers on a tiny model, by their commands."""

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import StudyError
from quant.recipe.recipe import QuantRecipe
from quant.studies.block_stream import BlockStream
from quant.studies.commands.options import study_device
from quant.studies.host import available_bytes, check_host, fits
from quant.studies.methods.calibration import Calibration, calibrate
from quant.studies.methods.compare import Calibrated, MethodQuantizer
from quant.studies.methods.formats import HIF8
from quant.studies.methods.injection import Outliers, blocks_of, difference, inject, velocity_of
from quant.studies.methods.methods_report import findings
from quant.studies.methods.registry import METHODS
from quant.studies.output.page import Page
from quant.studies.output.study_folder import StudyFolder, read_results
from quant.studies.points import Point, open_points
from quant.studies.progress import study_progress
from quant.studies.protection.analyze import Subject
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import model_fingerprint
from tests.quant.conftest import BLOCKS, tiny_recipe_dict
from tests.quant.studies.conftest import CALIBRATION, HELD_OUT, load_transformer, run

CHOSEN = "bf16,hif8,hif8-steps,hif8-gptq,int8-outliers,int4-per-token,hif8-attention-hif8"


def compare(model: Path, recorded: dict[str, Path], out: Path, *options: object) -> Any:
    return run(
        *("compare-methods", "--model", model, "--points", recorded["held-out"]),
        *("--calibration", recorded["calibration"], "--out", out, "--points-per-prompt", "1"),
        *options,
    )


@pytest.fixture(scope="module")
def comparison(
    tiny_model: Path, recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("study") / "comparison"
    result = compare(tiny_model, recorded, out, "--methods", CHOSEN)
    assert result.exit_code == 0, result.output
    return out


def test_methods_are_compared_under_each_protection(comparison: Path) -> None:
    results = read_results(comparison, "compare-methods")
    errors = {
        name: {protection: each["mean"] for protection, each in method["errors"].items()}
        for name, method in results["methods"].items()
    }
    assert list(errors) == CHOSEN.split(",")
    assert results["protections"] == {"none": [], "paper": [0, 3]}
    none = {name: each["none"] for name, each in errors.items()}
    assert none["bf16"] < none["int8-outliers"] < none["hif8"] < none["int4-per-token"]
    assert none["hif8-gptq"] != none["hif8"]
    assert none["hif8"] < none["hif8-attention-hif8"]
    assert all(each["paper"] < each["none"] for each in errors.values())
    sizes = results["methods"]["hif8"]["errors"]
    assert sizes["paper"]["bytes"] > sizes["none"]["bytes"]
    assert results["bf16_bytes"] == pytest.approx(2 * sizes["none"]["bytes"], rel=0.01)
    assert results["methods"]["bf16"]["calibration_s"] == 0
    assert results["methods"]["hif8-gptq"]["calibration_s"] > 0
    worse = results["against_ours"]["none"]["int4-per-token"]
    assert worse["mean"] == pytest.approx(none["int4-per-token"] - none["hif8"])
    for name in ("errors", "cost", "protection"):
        assert (comparison / "tables" / f"{name}.csv").read_text().count("\n") >= 8
    assert (comparison / "index.html").stat().st_size > 30_000


def test_an_error_is_that_of_the_whole_transformer_with_its_linears_replaced(
    tiny_model: Path, recorded: dict[str, Path], comparison: Path
) -> None:
    transformer = load_transformer(tiny_model)
    recipe = QuantRecipe.from_dict(tiny_recipe_dict())
    subject = Subject.of(transformer, recipe, torch.device("cpu"), keep=True)
    point = next(iter(open_points(recorded["held-out"])))
    method = METHODS["hif8-gptq"]
    calibration = Calibration(comparison / "calibration", (1, 3))
    quantizer = MethodQuantizer(method, Calibrated(subject, calibration, keep=False))
    change = quantizer.change((0, 3), (point.step,))
    whole = load_transformer(tiny_model).float()
    text = point.text.float()
    with torch.no_grad():
        exact = whole(point.latents, point.timestep, text).sample
        for index in (1, 2):
            whole.blocks[index] = change(index, whole.blocks[index])
        found = whole(point.latents, point.timestep, text).sample
    expected = float((found - exact).square().sum() / exact.square().sum())
    lines = (comparison / "units.jsonl").read_text().splitlines()
    units = {each["unit"]: each["value"] for each in map(json.loads, lines)}
    assert units["hif8-gptq/0"]["paper"][0] == pytest.approx(expected, rel=1e-3)

    codes = calibration.codes(1, method, torch.device("cpu"))["ffn.net.2"].float()
    assert torch.equal(HIF8.fake_quantize(codes, torch.tensor(1.0)), codes), "on the grid"
    statistics = calibration.statistics(1, torch.device("cpu"))
    assert torch.equal(statistics["attn1.to_q"].channels, statistics["attn1.to_v"].channels)
    assert not torch.equal(statistics["attn1.to_q"].channels, statistics["attn2.to_q"].channels)


def test_linears_that_a_recipe_keeps_are_rounded_by_no_method(
    tiny_model: Path, recorded: dict[str, Path], comparison: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "kept.json", tmp_path / "comparison"
    kept = ["blocks.*.ffn.net.2", "blocks.2.*"]
    recipe.write_text(json.dumps(tiny_recipe_dict() | {"kept_linears": kept}))
    options = ("--methods", "int4-per-token", "--recipe", recipe)
    result = compare(tiny_model, recorded, out, *options)
    assert result.exit_code == 0, result.output
    found, whole = (read_results(each, "compare-methods") for each in (out, comparison))
    assert found["recipe"] == "tiny, which keeps blocks.*.ffn.net.2, blocks.2.* in BF16"
    assert found["bf16_bytes"] < 0.75 * whole["bf16_bytes"]
    for name, method in found["methods"].items():
        for protection, errors in method["errors"].items():
            assert errors["mean"] < whole["methods"][name]["errors"][protection]["mean"]
    transformer = load_transformer(tiny_model)
    subject = Subject.of(transformer, QuantRecipe.load(recipe), torch.device("cpu"), keep=True)
    calibrated = Calibrated(subject, Calibration(out / "calibration", (1, 3)), keep=False)
    change = MethodQuantizer(METHODS["hif8"], calibrated).change((), (1,))
    block = change(1, transformer.blocks[1])
    exact = [name for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)]
    assert exact == ["ffn.net.2"]
    assert calibrated.calibration.statistics(2, torch.device("cpu")) == {}
    # As a study is after a move without its weights.
    (out / "calibration" / "001.safetensors").unlink()
    state = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(state | {"state": "running"}))
    assert compare(tiny_model, recorded, out, *options).exit_code == 0
    assert (out / "calibration" / "001.safetensors").exists()
    again = read_results(out, "compare-methods")
    assert again["against_ours"] == found["against_ours"]


def test_a_comparison_goes_on_and_gives_the_same(
    tiny_model: Path, recorded: dict[str, Path], comparison: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    os.symlink(comparison / "calibration", again / "calibration")
    state = json.loads((comparison / "study.json").read_text())
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    lines = (comparison / "units.jsonl").read_text().splitlines(keepends=True)
    (again / "units.jsonl").write_text("".join(lines[: BLOCKS + 11]))
    result = compare(tiny_model, recorded, again, "--methods", CHOSEN)
    assert result.exit_code == 0, result.output
    assert (again / "results.json").read_bytes() == (comparison / "results.json").read_bytes()
    assert (again / "index.html").read_bytes() == (comparison / "index.html").read_bytes()
    del state["identity"]["measured recipe"]  # as an older version has begun it
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    result = compare(tiny_model, recorded, again, "--methods", CHOSEN)
    assert "holds a study of another measured recipe" in result.output


def test_streams_before_the_first_block_are_not_kept(
    tiny_model: Path,
    recorded: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 832x480x49 the 14B's take 415 MB for each point."""
    first: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    begin, block = BlockStream.begin, BlockStream.block

    def watched_begin(self: BlockStream, points: Sequence[Point]) -> Any:
        found = begin(self, points)
        first.append(weakref.ref(found[0]))
        return found

    def watched_block(self: BlockStream, index: int) -> torch.nn.Module:
        alive.append(sum(each() is not None for each in first))
        return block(self, index)

    monkeypatch.setattr(BlockStream, "begin", watched_begin)
    monkeypatch.setattr(BlockStream, "block", watched_block)
    recipe = QuantRecipe.from_dict(tiny_recipe_dict())
    cpu = torch.device("cpu")
    subject = Subject.of(load_transformer(tiny_model), recipe, cpu, keep=False)
    points = list(open_points(recorded["calibration"]))[:6]
    folder = StudyFolder.open(tmp_path / "study", "compare-methods", {})
    with study_progress("calibration", BLOCKS * len(points)) as progress:
        calibrate(subject, points, [METHODS["hif8"]], 2, folder, progress)
    assert len(first) == 3  # four points of one step, two of another
    assert alive == [3, 0, 0, 0]


def test_streams_count_and_are_refused_where_they_do_not_fit(
    tiny_model: Path, recorded: dict[str, Path]
) -> None:
    gib = 1 << 30
    assert fits(3 * gib, 0, 80 * gib)
    assert not fits(3 * gib, 53 * gib, 80 * gib)
    check_host(53 * gib, 128, 60 * gib)
    with pytest.raises(StudyError, match=r"of 128 points .* 53.0 GiB, and the host has 50.0 GiB"):
        check_host(53 * gib, 128, 50 * gib)
    assert gib // 64 < available_bytes() < 1 << 50
    transformer = load_transformer(tiny_model)
    point = next(iter(open_points(recorded["calibration"])))
    assert study_device("cpu", transformer, [point]) == (torch.device("cpu"), True)
    huge = replace(point, latents=point.latents.expand(1 << 40, -1, -1, -1, -1))
    with pytest.raises(StudyError, match="take fewer points of each prompt, or fewer prompts"):
        study_device("cpu", transformer, [huge])


def test_an_analysis_adds_the_blocks_that_it_proposes(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    for name, fingerprint, prompts in (
        ("fit", model_fingerprint(tiny_model), CALIBRATION),
        ("other", "sha256-full-v2:0", CALIBRATION),
        ("same", model_fingerprint(tiny_model), HELD_OUT),
    ):
        identity = {"model": fingerprint, "set of points": json.dumps({"prompts": prompts})}
        analysis = StudyFolder.open(tmp_path / name, "analyze", identity)
        analysis.finish({"proposed": [1, 2]}, {}, {}, Page("", ""))
    out = tmp_path / "out"
    other = compare(tiny_model, recorded, out, "--analysis", tmp_path / "other")
    assert "is of another model" in other.output
    same = compare(tiny_model, recorded, out, "--analysis", tmp_path / "same")
    assert "choose and test on different prompts" in same.output
    chosen = ("--methods", "hif8", "--analysis", tmp_path / "fit")
    result = compare(tiny_model, recorded, out, *chosen)
    assert result.exit_code == 0, result.output
    results = read_results(out, "compare-methods")
    assert results["protections"] == {"none": [], "paper": [0, 3], "proposed": [1, 2]}
    assert results["against_none"]["proposed"]["hif8"]["mean"] < 0


def test_unfit_input_is_refused(
    tiny_model: Path, recorded: dict[str, Path], comparison: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    unknown = compare(tiny_model, recorded, out, "--methods", "int9")
    assert "method 'int9' is not one of all" in unknown.output
    same = recorded | {"calibration": recorded["held-out"]}
    shared = compare(tiny_model, same, out)
    assert "choose and test on different prompts" in shared.output
    other = compare(tiny_model, recorded, comparison, "--methods", "hif8")
    assert "another set of methods" in other.output
    analysis = compare(tiny_model, recorded, out, "--analysis", comparison)
    assert "where a finished 'analyze' is wanted" in analysis.output
    assert all(each.exit_code == 1 for each in (unknown, shared, other, analysis))
    assert not out.exists()


def test_findings_do_not_claim_what_the_prompts_cannot_show() -> None:
    real = {"mean": -0.1, "real": True}
    unsure = {"mean": 0.1, "real": False}
    results = {
        "prompts": 5,
        "against_ours": {"none": {"a": real, "b": unsure}},
        "against_none": {"paper": {"a": real, "b": unsure}},
    }
    found = findings(results)
    assert found[0].endswith("less error than hif8: a. More: none. Not told apart: b.")
    assert found[1] == "Protecting blocks (paper) lowers the error of a."
    assert "5 prompts are too few for 2 tests" in found[2]
    assert len(findings(results | {"prompts": 12})) == 2


@pytest.mark.parametrize(("where", "blocks"), [("ends", (0, 3)), ("middle", (1, 2))])
def test_outliers_are_injected_without_changing_the_function(
    tiny_model: Path, tmp_path: Path, where: str, blocks: tuple[int, ...]
) -> None:
    out = tmp_path / "subject"
    result = run("inject-outliers", "--model", tiny_model, "--out", out, "--blocks", where)
    assert result.exit_code == 0, result.output
    assert model_fingerprint(out) != model_fingerprint(tiny_model)
    assert model_fingerprint(out) in result.output
    check_pipeline_weights(out)
    before, after = load_transformer(tiny_model), load_transformer(out)
    assert difference(velocity_of(after, None), velocity_of(before, None)) <= 1e-5
    for index in range(BLOCKS):
        old, new = (each.blocks[index].attn1.to_v.weight for each in (before, after))
        assert int((new != old).any(1).sum()) == (2 if index in blocks else 0)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (out / vae).samefile(tiny_model / vae)
    again = run("inject-outliers", "--model", tiny_model, "--out", out)
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_impossible_outliers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for option, value, words in (
        ("--factor", 48, "must be a power of two"),
        ("--factor", 1, "must be a power of two from 2 to 1024"),
        ("--channels", 0, "0 channels must be between 1 and 32"),
    ):
        result = run(
            *("inject-outliers", "--model", tiny_model, "--out", tmp_path / "out", option, value)
        )
        assert result.exit_code == 1
        assert words in result.output
    assert not (tmp_path / "out").exists()


def test_a_block_of_a_miniature_has_three_places() -> None:
    transformer = load_transformer(Path("models/wan-mini"))
    blocks = blocks_of("ends", len(transformer.blocks))
    assert blocks == (0, 1, 37, 38, 39)
    assert inject(transformer, Outliers(blocks, 2, 64)) == 5 * 3 * 2
