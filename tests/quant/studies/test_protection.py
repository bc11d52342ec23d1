"""Test analyze and ablate on a tiny model, by their commands, and what they are made of."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from quant.errors import StudyError
from quant.numerics.scaling import binade_histogram
from quant.recipe.recipe import QuantRecipe
from quant.studies.block_stream import BlockStream
from quant.studies.output.study_folder import StudyFolder, read_results
from quant.studies.points import open_points
from quant.studies.protection.ablate import all_protections, report
from quant.studies.protection.activations import Activation, measure_points, share_beyond_band
from quant.studies.protection.analyze import Subject, quantizer_of
from quant.studies.protection.block_sets import greedy_set, middle_set, paper_sets, random_sets
from quant.studies.protection.proposal import Proposal
from quant.studies.protection.sensitivity import Sweep, Variant, energies, sweep_cost, sweeps
from quant.transformer.quantized_linear import QuantizedLinear
from tests.quant.conftest import BLOCKS, tiny_recipe_dict
from tests.quant.studies.conftest import CALIBRATION, load_transformer, run

BOUNDS = ("low", "high")


def analyze(model: Path, points: Path, out: Path, *options: str) -> Any:
    recipe = out.parent / "tiny.toml"
    if not recipe.exists():
        text = Path("quant/recipe/presets/boundary-hif8.toml").read_text()
        text = text.replace("total_blocks = 40", f"total_blocks = {BLOCKS}")
        recipe.write_text(text.replace("[0, 1, 37, 38, 39]", "[0]"))
    small: tuple[str | Path, ...] = ("--points-per-prompt", "1", "--linear-points", "2")
    small += ("--recipe", recipe)
    return run("analyze", "--model", model, "--points", points, "--out", out, *small, *options)


@pytest.fixture(scope="module")
def analysis(
    tiny_model: Path, recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("study") / "analysis"
    result = analyze(tiny_model, recorded["calibration"], out, "--blocks", "2")
    assert result.exit_code == 0, result.output
    return out


def test_an_analysis_proposes_the_blocks_that_suffer_most(analysis: Path) -> None:
    results = read_results(analysis, "analyze")
    means = {int(block): each["mean"] for block, each in results["blocks"].items()}
    assert results["proposed"] == sorted(sorted(means, key=lambda b: -means[b])[:2])
    assert all(each["low"] <= each["mean"] <= each["high"] for each in results["blocks"].values())
    assert len(results["linears"]) == 10 * BLOCKS
    recipe = QuantRecipe.load(analysis / "recipe.toml")
    assert list(recipe.protected_blocks) == results["proposed"]
    assert recipe.total_blocks == BLOCKS
    for name in ("blocks", "linears", "additivity"):
        assert (analysis / "tables" / f"{name}.csv").read_text().count("\n") > 2
    assert (analysis / "index.html").stat().st_size > 50_000


def test_energies_add_nearly(analysis: Path) -> None:
    for name, each in read_results(analysis, "analyze")["additivity"].items():
        assert each["measured"] == pytest.approx(each["predicted"], rel=0.5), name


def test_a_variant_s_energy_is_that_of_a_pass_with_only_its_linears_quantized(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path
) -> None:
    transformer = load_transformer(tiny_model)
    recipe = QuantRecipe.load(analysis / "recipe.toml")
    subject = Subject.of(transformer, recipe, torch.device("cpu"), keep=True)
    folder = StudyFolder.finished(analysis, "analyze")
    quantizer = quantizer_of(subject, folder, len(CALIBRATION))
    points = list(open_points(recorded["calibration"]))[:3]
    one = ("blocks.2.ffn.net.2",)
    variants = [*subject.single_blocks(), Variant("a linear", 2, one)]
    variants.sort(key=lambda each: each.block)
    passes: list[int] = []
    sweep = Sweep(subject.exact, quantizer, 7, passes.append)
    found = sweep.energies(points, variants)
    assert sum(passes) == sweep_cost(BLOCKS, variants, len(points))
    assert sweep.energies(points, variants[1:3]) == {
        each.key: pytest.approx(found[each.key], rel=1e-4) for each in variants[1:3]
    }

    whole = load_transformer(tiny_model).float()
    for place, point in enumerate(points):
        text = point.text.float()
        with torch.no_grad():
            exact = whole(point.latents, point.timestep, text).sample
            for each in variants:
                block = whole.blocks[each.block]
                whole.blocks[each.block] = quantizer.variant(each.block, block, each.names)
                rounded = whole(point.latents, point.timestep, text).sample
                whole.blocks[each.block] = block
                expected = float((rounded - exact).square().sum() / exact.square().sum())
                assert found[each.key][place] == pytest.approx(expected, rel=1e-3)
    quantized = quantizer.variant(2, subject.exact.block(2), subject.full_names(2))
    assert sum(isinstance(each, QuantizedLinear) for each in quantized.modules()) == 10


def test_a_sweep_holds_no_more_streams_than_there_is_memory_for() -> None:
    """A 14B's stream takes 415 MB at 832x480 and 49 frames: 18 and the reference are held."""
    variants = [Variant(str(block), block, ()) for block in range(40)]
    found = sweeps(variants, 415_334_400)
    assert [len(each) for each in found] == [19, 19, 2]
    assert [each for part in found for each in part] == variants
    assert [len(each) for each in sweeps(variants, 20 << 30)] == [1] * 40
    assert sweep_cost(40, variants, 2) == 2 * (40 + 820)


def test_points_that_run_together_have_their_own_statistics(
    tiny_model: Path, recorded: dict[str, Path]
) -> None:
    recipe = QuantRecipe.from_dict(tiny_recipe_dict())
    subject = Subject.of(load_transformer(tiny_model), recipe, torch.device("cpu"), keep=True)
    points = list(open_points(recorded["calibration"]))[:3]
    together = measure_points(subject.exact, points, subject.linears)
    alone = [measure_points(subject.exact, [each], subject.linears) for each in points]
    for name, values in together.linears.items():
        expected = torch.cat([each.linears[name] for each in alone])
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-5), name
        counts = torch.stack([each.binades[name] for each in alone]).sum(0)
        assert (together.binades[name] - counts).abs().sum() <= 0.01 * counts.sum()
    expected = torch.stack([torch.cat(each.update) for each in alone], 1)
    assert torch.allclose(torch.stack(together.update), expected, rtol=1e-3)


def test_an_analysis_goes_on_and_gives_the_same(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    state = json.loads((analysis / "study.json").read_text())
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    lines = (analysis / "units.jsonl").read_text().splitlines(keepends=True)
    (again / "units.jsonl").write_text("".join(lines[:11]))  # 8 activations, 3 sweeps
    result = analyze(tiny_model, recorded["calibration"], again, "--blocks", "2")
    assert result.exit_code == 0, result.output
    assert (again / "results.json").read_bytes() == (analysis / "results.json").read_bytes()
    assert (again / "index.html").read_bytes() == (analysis / "index.html").read_bytes()
    del state["identity"]["measured recipe"]  # as an older version has begun it
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    result = analyze(tiny_model, recorded["calibration"], again, "--blocks", "2")
    assert "holds a study of another measured recipe" in result.output
    result = analyze(tiny_model, recorded["calibration"], tmp_path / "n", "--linear-points", "1")
    assert result.exit_code == 2, "no interval comes from one prompt"
    assert not (tmp_path / "n").exists()


@pytest.fixture(scope="module")
def ablation(tiny_model: Path, recorded: dict[str, Path], analysis: Path) -> Path:
    out = analysis.parent / "ablation"
    result = run(
        *("ablate", "--model", tiny_model, "--points", recorded["held-out"], "--out", out),
        *("--analysis", analysis, "--recipe", analysis.parent / "tiny.toml"),
        *("--random-sets", "3", "--points-per-prompt", "1", "--batch", "3"),
    )
    assert result.exit_code == 0, result.output
    return out


def test_an_ablation_goes_on_and_gives_the_same(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, ablation: Path, tmp_path: Path
) -> None:
    """The kill came within a batch of three prompts, which then run together again."""
    again = tmp_path / "again"
    again.mkdir()
    state = json.loads((ablation / "study.json").read_text())
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    lines = (ablation / "units.jsonl").read_text().splitlines(keepends=True)
    (again / "units.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    result = run(
        *("ablate", "--model", tiny_model, "--points", recorded["held-out"], "--out", again),
        *("--analysis", analysis, "--recipe", analysis.parent / "tiny.toml"),
        *("--random-sets", "3", "--points-per-prompt", "1", "--batch", "3"),
    )
    assert result.exit_code == 0, result.output
    assert (again / "units.jsonl").read_bytes() == (ablation / "units.jsonl").read_bytes()
    assert (again / "results.json").read_bytes() == (ablation / "results.json").read_bytes()


def test_an_ablation_does_not_go_on_with_another_analysis(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, ablation: Path, tmp_path: Path
) -> None:
    """It proposes the same blocks, but its scales, or its prompts, may be others."""
    again, other = tmp_path / "again", Path(shutil.copytree(analysis, tmp_path / "other"))
    shutil.copytree(ablation, again)
    state = json.loads((ablation / "study.json").read_text())
    (again / "study.json").write_text(json.dumps(state | {"state": "running"}))
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(results | {"total_energy": 1.0}))
    result = run(
        *("ablate", "--model", tiny_model, "--points", recorded["held-out"], "--out", again),
        *("--analysis", other, "--recipe", analysis.parent / "tiny.toml"),
        *("--random-sets", "3", "--points-per-prompt", "1", "--batch", "3"),
    )
    assert result.exit_code == 1
    assert "holds a study of another analysis" in result.output


def test_an_ablation_takes_every_recipe_of_what_was_measured(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, tmp_path: Path
) -> None:
    words: tuple[str | Path, ...] = ("ablate", "--model", tiny_model, "--analysis", analysis)
    words += ("--points", recorded["held-out"], "--out", tmp_path / "out", "--random-sets", "0")
    text = (analysis / "recipe.toml").read_text()
    (tmp_path / "amax15.toml").write_text(text.replace('"pow2"', '"amax15"'))
    refused = run(*words, "--recipe", tmp_path / "amax15.toml")
    assert refused.exit_code == 1
    assert "measured another format, other scales or other linears" in refused.output
    assert not (tmp_path / "out").exists()
    result = run(*words, "--recipe", "auto-hif8", "--points-per-prompt", "1")
    assert result.exit_code == 0, result.output
    before = Proposal(StudyFolder.finished(analysis, "analyze"), (), (), "", "")
    with pytest.raises(StudyError, match="written by an older version"):
        before.check_recipe(QuantRecipe.load("auto-hif8"), BLOCKS)


def test_random_sets_have_the_size_of_what_they_are_compared_with() -> None:
    same = all_protections(40, (31, 32, 34, 36, 38), 50, 0)
    assert sum(name.startswith("random ") for name in same) == 50
    larger = all_protections(40, (30, 31, 32, 33, 34, 36, 38, 39), 6, 0)
    drawn = {name: each for name, each in larger.items() if name.startswith("random ")}
    assert [len(each.blocks) for each in drawn.values()] == [5] * 6 + [8] * 6
    assert len(set(drawn.values())) == 12
    single = all_protections(40, (7,), 60, 0)  # one of the 40 sets of this size
    sizes = [len(each.blocks) for name, each in single.items() if name.startswith("random ")]
    assert sizes == [5] * 60 + [1] * 39
    nothing = all_protections(40, (), 3, 0)
    assert sum(name.startswith("random ") for name in nothing) == 3


def test_only_sets_of_one_size_are_ranked_among_each_other(tmp_path: Path) -> None:
    protections = all_protections(40, (31, 32, 33, 34, 35, 36, 38, 39), 4, 0)
    worse = dict.fromkeys(protections, 0.5)
    worse |= {"auto": 0.2, "both ends": 0.4, "random 2": 0.3, "random 5": 0.1, "random 6": 0.2}
    folder = StudyFolder.open(tmp_path / "ablation", "ablate", {})
    for prompt in range(2):
        folder.keep(f"prompt/{prompt}", {name: [each] for name, each in worse.items()})
    results, tables, _, page = report(folder, ("a", "b"), protections, "boundary-hif8")
    sets = results["sets"]
    assert (sets["both ends"]["worse_random_sets"], sets["auto"]["worse_random_sets"]) == (3, 2)
    assert (sets["both ends"]["percentile"], sets["auto"]["percentile"]) == (75.0, 62.5)
    place = [column.heading for column in tables["named"].columns].index(
        "better than random sets of its size"
    )
    shown = {row[0]: row[place] for row in tables["named"].rows}
    assert {name for name, each in shown.items() if each} == {"both ends", "auto", "middle"}
    assert (shown["both ends"], shown["auto"], shown["middle"]) == ("3 of 4", "2 of 4", "0 of 4")
    assert "The paper&#x27;s blocks are better than 3 of 4 random sets of 5." in page.html()
    assert "The proposed blocks are better than 2 of 4 random sets of 8." in page.html()


def test_an_ablation_compares_sets_on_prompts_that_chose_nothing(ablation: Path) -> None:
    results = read_results(ablation, "ablate")
    sets = results["sets"]
    assert not any("attention" in name for name in sets)
    for name in ("none", "both ends", "auto", "middle"):
        found = results["attention"][name]
        assert found["linears"]["mean"] == sets[name]["mean"]
        assert found["both"]["mean"] > max(found[kind]["mean"] for kind in ("linears", "attention"))
        gap = found["both"]["mean"] - found["linears"]["mean"] - found["attention"]["mean"]
        assert found["both_minus_sum"]["mean"] == pytest.approx(gap, rel=1e-6, abs=1e-12)
    whole, ends = (results["attention"][name]["attention"] for name in ("none", "both ends"))
    assert ends["mean"] < whole["mean"]
    assert (ablation / "tables" / "attention.csv").read_text().count("\n") == 5
    assert {"none", "entry only", "exit only", "both ends", "auto", "middle"} <= sets.keys()
    assert sum(name.startswith("random") for name in sets) == results["random_sets"] == 3
    assert sets["none"]["mean"] == max(each["mean"] for each in sets.values())
    assert sets["none"]["gain_db"] == 0
    assert sets["auto"]["mean"] < sets["none"]["mean"]
    assert 0 <= sets["auto"]["percentile"] <= 100
    assert results["against_paper"]["none"]["low"] <= results["against_paper"]["none"]["mean"]


def test_figures_gathers_what_both_have_drawn(analysis: Path, ablation: Path) -> None:
    out = analysis.parent / "figures"
    result = run("figures", "--analysis", analysis, "--ablation", ablation, "--out", out)
    assert result.exit_code == 0, result.output
    sources = {"1b": analysis / "figures" / "update.png", "5": ablation / "figures" / "sets.png"}
    for number, source in (sources | {"2": analysis / "figures" / "activations.png"}).items():
        made = out / "figures" / f"figure-{number}.png"
        assert made.read_bytes() == source.read_bytes()
    claims = {each["claim"]: each for each in read_results(out, "figures")["claims"]}
    assert len(claims) == 8
    found = claims["Both ends protected is better than none"]
    low, high = (100 * read_results(ablation, "ablate")["against_paper"]["none"][k] for k in BOUNDS)
    assert found["interval"] == f"[{low:.3g}, {high:.3g}] %".replace("-", "−")
    assert found["n"] == "8 prompts, 8 points"


def test_prompts_that_chose_are_refused(
    tiny_model: Path, recorded: dict[str, Path], analysis: Path, tmp_path: Path
) -> None:
    result = run(
        *("ablate", "--model", tiny_model, "--points", recorded["calibration"]),
        *("--analysis", analysis, "--recipe", analysis.parent / "tiny.toml"),
        *("--out", tmp_path / "out"),
    )
    assert result.exit_code == 1
    assert "8 prompts" in result.output
    assert "choose and test on different prompts" in result.output
    assert not (tmp_path / "out").exists()


def test_statistics_of_an_activation() -> None:
    x = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(1))
    x[..., 5] *= 40
    found = Activation(*Activation.measure(x.reshape(1, -1, 64))[0].tolist())
    each = [Activation(*values) for values in Activation.measure(x).tolist()]
    assert [one.outlier_channels for one in each] == [1, 1]
    assert max(one.amax for one in each) == found.amax
    magnitude = x.abs().numpy().ravel()
    assert found.outlier_channels == 1
    assert found.amax == pytest.approx(magnitude.max())
    assert found.p999 == pytest.approx(np.quantile(magnitude, 0.999), rel=1e-3)
    centred = stats.kurtosis(x.numpy().ravel(), fisher=False)
    assert found.kurtosis == pytest.approx(centred, rel=0.02)


def test_the_share_beyond_the_three_bit_band() -> None:
    x = torch.tensor([[0.0, 0.24, 0.26, 1.0, 31.0, 33.0]])
    binades = binade_histogram(x)[0].tolist()
    assert share_beyond_band(binades, 2.0) == pytest.approx(2 / 5)


def test_error_energy_of_each_sample() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert energies(reference * 1.1, reference) == pytest.approx([0.01, 0.01])


def test_a_stream_may_be_dropped_block_by_block(tiny_model: Path) -> None:
    stream = BlockStream(load_transformer(tiny_model), torch.device("cpu"))
    assert stream.block(0) is not stream.block(0)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"count": 2}, (1, 3)),
        ({"count": 0}, ()),
        ({"error_share": 0.3}, (1, 3)),
        ({"error_share": 1.0}, ()),
        ({"budget_bytes": 350, "bytes_each": 100}, (0, 1, 3)),
    ],
)
def test_greedy_sets(budget: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert greedy_set({0: 2.0, 1: 5.0, 2: 1.0, 3: 4.0}, **budget) == expected


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one budget"),
        ({"count": 1, "error_share": 0.5}, "give one budget"),
        ({"count": 9}, "9 blocks to protect must be between 0 and 4"),
        ({"error_share": 1.5}, "must be between 0 and 1"),
    ],
)
def test_impossible_budgets(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        greedy_set({0: 2.0, 1: 5.0, 2: 1.0, 3: 4.0}, **budget)


def test_sets_of_any_number_of_blocks() -> None:
    assert paper_sets(40)["both ends"] == (0, 1, 37, 38, 39)
    assert paper_sets(30)["both ends"] == (0, 1, 28, 29)
    assert paper_sets(4)["both ends"] == (0, 3)
    assert middle_set(40, 5) == (17, 18, 19, 20, 21)
    drawn = random_sets(40, 5, 50, seed=1, without=[(0, 1, 37, 38, 39)])
    assert len(set(drawn)) == 50
    assert drawn == random_sets(40, 5, 50, seed=1, without=[(0, 1, 37, 38, 39)])
    with pytest.raises(StudyError, match="no 7 different sets of 2 of 4"):
        random_sets(4, 2, 7, seed=0)
