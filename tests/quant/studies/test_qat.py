"""Test qat on a tiny model, by its command."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from quant.calibration.scales import load_scales
from quant.errors import ConversionError
from quant.recipe.recipe import QuantRecipe
from quant.studies.methods.calibration import Calibration
from quant.studies.methods.compare import Calibrated, MethodQuantizer
from quant.studies.methods.registry import METHODS
from quant.studies.output.study_folder import read_results
from quant.studies.points import open_points
from quant.studies.protection.analyze import Subject
from quant.studies.protection.sensitivity import energies
from quant.studies.qat.training import Trainer
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import model_fingerprint
from tests.quant.conftest import tiny_recipe_dict
from tests.quant.studies.conftest import load_transformer, run

PROMPTS = "calibration.txt"
SMALL = ("--learning-rates", "3e-5", "--batches", "4", "--training-points-per-prompt", "4")


def qat(model: Path, recorded: dict[str, Path], out: Path, *options: object) -> Any:
    return run(
        *("qat", "--model", model, "--points", recorded["held-out"]),
        *("--training", recorded["calibration"], "--out", out, *options),
    )


def units_of(study: Path) -> dict[str, Any]:
    lines = (study / "units.jsonl").read_text().splitlines()
    return {each["unit"]: each["value"] for each in map(json.loads, lines)}


@pytest.fixture(scope="module")
def study(
    tiny_model: Path, recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("qat") / "study"
    result = qat(
        *(tiny_model, recorded, out, *SMALL),
        *("--methods", "int4-per-token", "--steps", "10,30"),
    )
    assert result.exit_code == 0, result.output
    assert "1 trainings and 1 controls of 30 steps" in result.output
    return out


def test_training_through_the_rounding_lowers_the_error_of_four_bits(study: Path) -> None:
    results = read_results(study, "qat")
    before = results["ptq"]["int4-per-token"]["velocity"]["mean"]
    first, last = results["cells"]
    assert (first["step"], last["step"]) == (10, 30)
    assert last["velocity"]["mean"] < 0.85 * before
    assert last["velocity"]["against_ptq"]["outcome"] == "better"
    assert last["velocity"]["gain_db"] > 0.7
    assert last["training_loss"] < first["training_loss"]
    assert "Of 2 trainings " in results["findings"][0]
    assert "so it is training through the rounding that helps" in results["findings"][0]
    page = (study / "index.html").read_text()
    assert "one training with one seed: what is said of it holds for that trained model" in page
    assert "Equal steps are not equal samples" in page
    for name in ("velocity-cells", "velocity-controls", "velocity-when"):
        assert (study / "tables" / f"{name}.csv").read_text().count("\n") >= 3
    assert (study / "figures" / "velocity-int4-per-token.png").stat().st_size > 5_000
    assert (study / "index.html").stat().st_size > 10_000
    assert not (study / "training.safetensors").exists()


def test_the_control_is_trained_alike_and_measured_as_ptq_too(study: Path) -> None:
    results = read_results(study, "qat")
    exact = results["ptq"]["bf16"]["velocity"]["mean"]
    assert exact < 1e-4
    control = next(each for each in results["controls"] if each["step"] == 30)
    assert control["velocity"]["bf16"]["mean"] > 2 * exact, "training moves the model by itself"
    after = control["velocity"]["int4-per-token"]["mean"]
    cell = results["cells"][1]
    assert cell["velocity"]["against_control"]["mean"] == pytest.approx(
        cell["velocity"]["mean"] - after
    )
    assert after > 1.2 * cell["velocity"]["mean"], "training alone does not do it"


def test_ptq_is_what_compare_methods_measures(
    tiny_model: Path, recorded: dict[str, Path], study: Path
) -> None:
    recipe = QuantRecipe.from_dict(tiny_recipe_dict())
    transformer = load_transformer(tiny_model)
    subject = Subject.of(transformer, recipe, torch.device("cpu"), keep=True)
    every = list(open_points(recorded["held-out"]).of_prompt(0))
    points = [every[0], every[2]]  # what HeldOut chooses for the first prompt
    calibration = Calibration(study / "calibration", (1, 3))
    exact = subject.exact.velocity(points)
    for method in ("int4-per-token", "bf16"):
        quantizer = MethodQuantizer(METHODS[method], Calibrated(subject, calibration, keep=False))
        change = quantizer.change((0, 3), tuple(point.step for point in points))
        expected = energies(subject.exact.velocity(points, change), exact)
        found = units_of(study)[f"ptq/{method}"]["velocity"][:2]
        assert found == pytest.approx(expected, rel=2e-2 if method == "bf16" else 1e-3)


def test_the_trained_pipeline_is_what_was_measured(
    tiny_model: Path, recorded: dict[str, Path], study: Path, tmp_path: Path
) -> None:
    model = study / "model"
    check_pipeline_weights(model)
    assert model_fingerprint(model) != model_fingerprint(tiny_model)
    trained = load_transformer(model)
    recipe = QuantRecipe.from_dict(tiny_recipe_dict())
    subject = Subject.of(trained, recipe, torch.device("cpu"), keep=True)
    original = Subject.of(load_transformer(tiny_model), recipe, torch.device("cpu"), keep=True)
    every = list(open_points(recorded["held-out"]).of_prompt(0))
    points = [every[0], every[2]]
    method = METHODS["int4-per-token"]
    calibration = Calibration(study / "calibration", (1, 3))
    quantizer = MethodQuantizer(method, Calibrated(subject, calibration, keep=False))
    found = subject.exact.velocity(points, quantizer.change((0, 3), (1, 3)))
    expected = energies(found, original.exact.velocity(points))
    name = "int4-per-token/lr3e-05/batch4/data8/seed0/30"
    measured = units_of(study)[name]["measured"]["int4-per-token"]["velocity"][:2]
    assert measured == pytest.approx(expected, rel=1e-3)

    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe_dict()))
    scales = tmp_path / "scales.safetensors"
    result = run(
        *("calibrate", "--model", model, "--prompts", recorded["calibration"].parent / PROMPTS),
        *("--recipe", tmp_path / "recipe.json", "--out", scales, "--text-tokens", "16"),
        *("--steps", "4", "--frames", "1", "--size", "32x32"),
    )
    assert result.exit_code == 0, result.output
    assert load_scales(scales).model_fingerprint == model_fingerprint(model)


def test_a_killed_study_goes_on_and_gives_the_same_bytes(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--methods", "hif4", "--steps", "3,12", *SMALL, "--checkpoint-s", "0")
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert qat(tiny_model, recorded, whole, *options).exit_code == 0
    control = "bf16/lr3e-05/batch4/data8/seed0"
    real = Trainer.step

    def stops_at_the_seventh(trainer: Trainer) -> None:
        if trainer.done == 6:
            raise KeyboardInterrupt
        real(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stops_at_the_seventh)
        stopped = qat(tiny_model, recorded, again, *options)
    assert stopped.exit_code == 130
    assert "the same command goes on from here" in stopped.output
    assert f"{control}/3" in units_of(again)
    assert f"{control}/12" not in units_of(again)
    assert "weight" in str(load_file(again / "training.safetensors").keys())
    begun_at: list[int] = []

    def noted(trainer: Trainer) -> None:
        begun_at.append(trainer.done)
        real(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", noted)
        result = qat(tiny_model, recorded, again, *options)
    assert result.exit_code == 0, result.output
    assert begun_at[0] == 6, "the steps that were done are not done again"
    for name in ("results.json", "index.html", "tables/velocity-cells.csv"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (whole / weights).read_bytes()
    assert model_fingerprint(again / "model") == model_fingerprint(whole / "model")


def test_a_grid_shares_one_model_and_names_what_diverges(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'steps = [2, 6]\n[[grid]]\nmethods = ["hif8", "int8-static"]\nlearning_rates = [1e-4]\n'
        "batches = [1]\ndata = [2, 8]\n"
        '[[grid]]\nmethods = ["int8-static"]\nlearning_rates = [1e30]\nbatches = [4]\ndata = [8]\n'
    )
    out = tmp_path / "out"
    small = ("--training-points-per-prompt", "2", "--points-per-prompt", "1", "--protect", "none")
    result = qat(tiny_model, recorded, out, "--grid", grid, *small, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    results = read_results(out, "qat")
    assert len(results["cells"]) == 2 * 5
    assert len(results["controls"]) == 2 * 3
    assert not (out / "model").exists()
    worst = [cell for cell in results["cells"] if cell["learning_rate"] == 1e30]
    assert [cell["diverged"] for cell in worst] == [True, True]
    assert sum(cell["diverged"] for cell in results["cells"]) == 2
    assert "and 2 diverged" in results["findings"][1]
    assert "8 prompts are too few for 10 trainings" in " ".join(results["findings"])


def test_a_kill_while_a_run_is_given_up_leaves_a_study_that_can_finish(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    trained = ("--methods", "int8-static", "--learning-rates", "1e30", "--steps", "1,2,3")
    options = (*trained, *SMALL[2:], "--points-per-prompt", "1")
    result = qat(tiny_model, recorded, out, *options)
    assert result.exit_code == 1
    assert f"wrote {out}" in result.output
    assert "the training diverged, so there is no trained pipeline" in result.output
    assert "the trained pipeline is" not in result.output
    assert not (out / "model").exists()
    # As a kill between two marks leaves it: the last are not kept, and no page is written.
    finished = (out / "results.json").read_bytes()
    (out / "results.json").unlink()
    lines = (out / "units.jsonl").read_text().splitlines(keepends=True)
    assert sum('"diverged"' in line for line in lines[-3:]) == 3
    (out / "units.jsonl").write_text("".join(lines[:-2]))
    state = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(state | {"state": "running"}))
    again = qat(tiny_model, recorded, out, *options)
    assert "the training diverged" in again.output
    assert (out / "results.json").read_bytes() == finished


def test_linears_that_a_recipe_keeps_are_neither_rounded_nor_hidden(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    recipe = QuantRecipe.from_dict(
        tiny_recipe_dict() | {"name": "kept", "kept_linears": ["blocks.*.ffn.net.2"]}
    )
    subject = Subject.of(load_transformer(tiny_model), recipe, torch.device("cpu"), keep=True)
    plain = replace(recipe, kept_linears=())
    whole = Subject.of(load_transformer(tiny_model), plain, torch.device("cpu"), keep=True)
    for block, names in whole.linears.items():
        assert subject.linears[block] == tuple(each for each in names if each != "ffn.net.2")
    wrong, transformer = replace(recipe, kept_linears=("blocks.9.*",)), load_transformer(tiny_model)
    with pytest.raises(ConversionError, match=r"'blocks\.9\.\*' of recipe 'kept' matches none"):
        Subject.of(transformer, wrong, torch.device("cpu"), keep=True)
    found = {}
    for name, kept in (("plain", []), ("kept", ["blocks.*.ffn.net.2"])):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(tiny_recipe_dict() | {"kept_linears": kept}))
        options = ("--methods", "int4-per-token", "--steps", "1", *SMALL, "--recipe", file)
        result = qat(tiny_model, recorded, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        found[name] = read_results(tmp_path / name, "qat")["ptq"]["int4-per-token"]["velocity"]
    assert found["kept"]["mean"] < 0.97 * found["plain"]["mean"], "net.2 stays in BF16"
    assert "which keeps blocks.*.ffn.net.2 in BF16" in (tmp_path / "kept/index.html").read_text()


def test_adapters_are_trained_quantized_and_read_by_diffusers(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    options = ("--methods", "int4-per-token", "--steps", "25", *SMALL, "--learning-rates", "1e-3")
    result = qat(tiny_model, recorded, out, *options, "--adapter", "lora", "--rank", "4")
    assert result.exit_code == 0, result.output
    results = read_results(out, "qat")
    before = results["ptq"]["int4-per-token"]["velocity"]["mean"]
    assert results["cells"][0]["velocity"]["mean"] < 0.95 * before
    adapter = out / "adapter"
    assert len(load_file(adapter / "pytorch_lora_weights.safetensors")) == 2 * 2 * 10
    merged = load_transformer(out / "model").float()
    adapted = WanTransformer3DModel.from_pretrained(tiny_model / "transformer").float()
    adapted.load_lora_adapter(
        adapter, prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
    )
    plain = load_transformer(tiny_model).float()
    point = next(iter(open_points(recorded["held-out"])))
    with torch.no_grad():
        inputs = (point.latents, point.timestep, point.text.float())
        velocity = [each(*inputs).sample for each in (merged, adapted, plain)]
    # The merged weights were rounded to BF16, the adapted ones were not.
    assert energies(velocity[0], velocity[1])[0] < 0.1 * energies(velocity[2], velocity[1])[0]
    for name, each in merged.named_parameters():
        if "blocks.0." in name or name.endswith("bias"):
            assert torch.equal(each, plain.get_parameter(name)), "only rounded linears change"


@pytest.mark.cuda
def test_replayed_steps_give_what_launched_ones_do(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'steps = [3, 12]\n[[grid]]\nmethods = ["hif8", "hif4", "int8-static"]\n'
        "learning_rates = [1e-5, 3e-5]\nbatches = [1, 4]\ndata = [8]\n"
    )
    found = {}
    for mode in ("--graphs", "--no-graphs"):
        out = tmp_path / mode
        result = qat(tiny_model, recorded, out, "--grid", grid, "--device", "cuda", mode)
        assert result.exit_code == 0, result.output
        found[mode] = read_results(out, "qat")["cells"]
    for replayed, launched in zip(*found.values(), strict=True):
        assert replayed["training_loss"] == pytest.approx(launched["training_loss"], rel=0.02)
        after = replayed["velocity"]["mean"]
        assert after == pytest.approx(launched["velocity"]["mean"], rel=0.05)


def test_without_peft_adapters_are_refused_with_the_remedy(
    tiny_model: Path, recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    options = ("--methods", "hif8", *SMALL, "--adapter", "lora")
    result = qat(tiny_model, recorded, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "pip install 'wan-hif8[studies]'" in result.output
    assert not (tmp_path / "out").exists()


def test_unfit_input_is_refused(
    tiny_model: Path, recorded: dict[str, Path], study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    grid = tmp_path / "grid.toml"
    grid.write_text("steps = [1]\n")
    moved = shutil.copytree(recorded["held-out"], tmp_path / "other-model")
    info = json.loads((moved / "points.json").read_text())
    (moved / "points.json").write_text(json.dumps(info | {"model": "sha256-full-v2:0"}))
    hif8 = ("--methods", "hif8")
    for points, options, words in (
        (recorded, (), "give --methods, such as hif8,hif4, or --grid"),
        (recorded, ("--methods", "int9"), "method 'int9' is not known"),
        (recorded, ("--methods", "hif8-gptq"), "rounded once, in calibration"),
        (recorded, ("--methods", "bf16"), "'bf16' is the control"),
        (recorded, (*hif8, "--learning-rates", "fast"), "--learning-rates 'fast' must be numbers"),
        (recorded, (*hif8, "--learning-rates", "0"), "learning rate 0.0 must be a number above 0"),
        (recorded, (*hif8, "--steps", "0,5"), "0 steps must be from 1"),
        (recorded, (*hif8, "--data", "9"), "more than the 8 there are"),
        (recorded, (*hif8, "--data", "1", "--batches", "5"), "batch of 5 is larger than the 4"),
        (recorded, (*hif8, "--protect", "0,4"), "'0,4' must be none, paper, or numbers from 0"),
        (recorded, (*hif8, "--loss", "flow"), "--loss flow needs --clips and --held-out-clips"),
        (recorded, (*hif8, "--clips", out), "clips are for --loss flow"),
        (recorded, (*hif8, "--grid", grid), "give --grid, or options such as --methods"),
        (recorded, ("--grid", grid), "must hold `steps`, a list, and tables [[grid]]"),
        (
            recorded | {"calibration": recorded["held-out"]},
            hif8,
            "choose and test on different prompts",
        ),
        (recorded | {"held-out": moved}, hif8, "was recorded from another model"),
    ):
        result = qat(tiny_model, points, out, *options)
        assert result.exit_code == 1, options
        assert words in result.output, result.output
        assert not out.exists()
    other = qat(tiny_model, recorded, study, *hif8, *SMALL)
    assert "another grid" in other.output
