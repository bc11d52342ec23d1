"""Test evaluate and figures on a tiny model, by their commands."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import quant
from quant.calibration.scales import Scales
from quant.errors import StudyError
from quant.studies.evaluation import generate
from quant.studies.evaluation.calibrations import unequal_calibrations
from quant.studies.evaluation.candidates import Candidate
from quant.studies.evaluation.gate import read_gate
from quant.studies.evaluation.measures import Measure
from quant.studies.evaluation.verdict import compare, diverged, divergence_words
from quant.studies.evaluation.video_files import Video
from quant.studies.output.study_folder import read_results
from tests.quant.conftest import PROMPTS
from tests.quant.studies.conftest import run

UNSEEN = [f"the {shape}" for shape in "abcdefgh"]
SMALL = ("--steps", "2", "--frames", "5", "--size", "32x32", "--text-tokens", "16")
JUDGES = ("latent-sqnr", "psnr", "temporal-flickering")


@pytest.fixture(scope="module")
def files(
    tiny_model: Path, tiny_scales: Scales, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))  # its name in the scales file
    (folder / "unseen.txt").write_text("\n".join(UNSEEN))
    quant.save_scales(tiny_scales, folder / "tiny.safetensors")
    return {"folder": folder, "model": tiny_model, "scales": folder / "tiny.safetensors"}


def evaluate(files: dict[str, Path], out: Path, *options: str | Path, scales: str = "") -> Any:
    candidate = scales or f"w8a8={files['scales']}"
    judges = [each for name in JUDGES for each in ("--judge", name)]
    return run(
        *("evaluate", "--model", files["model"], "--candidate", candidate, "--out", out),
        *("--prompts", files["folder"] / "unseen.txt", *judges, *SMALL, *options),
    )


@pytest.fixture(scope="module")
def evaluation(files: dict[str, Path]) -> Path:
    out = files["folder"] / "evaluation"
    gate = files["folder"] / "loose.toml"
    gate.write_text("[psnr]\nmin = 3\n[temporal-flickering]\nmin_difference = -0.5\n")
    result = evaluate(files, out, "--gate", gate)
    assert result.exit_code == 0, result.output
    assert "16 videos of at most 0.0 GiB together, 64 passes of the transformer" in result.output
    assert result.output.index("16 videos") < result.output.index("wrote")
    return out


def test_an_evaluation_has_a_number_of_every_judge_for_every_video(evaluation: Path) -> None:
    results = read_results(evaluation, "evaluate")
    assert list(results["measures"]) == list(JUDGES)
    for name, measure in results["measures"].items():
        names = ["w8a8"] if measure["needs"] == "pair" else ["bf16", "w8a8"]
        assert list(measure["candidates"]) == names, name
        for each in measure["candidates"].values():
            assert len(each["scores"]) == 8
            assert each["low"] <= each["mean"] <= each["high"]
    assert 10 < results["measures"]["latent-sqnr"]["candidates"]["w8a8"]["mean"] < 80
    assert [each["judge"] for each in results["comparisons"]] == ["temporal-flickering"]
    assert results["gate"]["broken"] == []
    assert len(list((evaluation / "videos" / "w8a8").glob("*.mp4"))) == 8
    assert (evaluation / "tables" / "scores.csv").read_text().count("\n") == 1 + 8 * 4
    head = (evaluation / "tables" / "comparisons.csv").read_text().partition("\n")[0]
    assert head.startswith("judge,first − second,shown,p (Holm),mean"), "in sight without scrolling"
    for name in ("scores", "grid"):
        assert (evaluation / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_links_every_video_that_is_beside_it(evaluation: Path) -> None:
    page = (evaluation / "index.html").read_text()
    links = re.findall(r'<a href="([^"]+)">(\d+)</a>', page)
    assert len(links) == 16
    assert all((evaluation / link).is_file() for link, _ in links)
    assert [link for link, seed in links if seed == "3"] == [
        "videos/bf16/00003-0.mp4",
        "videos/w8a8/00003-0.mp4",
    ]
    row = next(each for each in page.split("<tr>") if "00003-0.mp4" in each)
    assert f">{UNSEEN[3]}<" in row


def test_a_video_is_that_of_a_pipeline_with_the_quantized_transformer(
    evaluation: Path, files: dict[str, Path], tiny_pipe: WanPipeline, tiny_scales: Scales
) -> None:
    transformer, _ = quant.quantize_transformer(
        tiny_pipe.transformer, tiny_scales.recipe, tiny_scales
    )
    parts = tiny_pipe.components | {"transformer": transformer}
    pipe = WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        prompt=UNSEEN[3],
        negative_prompt="",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=5.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
    video = Video(UNSEEN[3], 3, evaluation / "videos" / "w8a8" / "00003-0")
    found = video.latents()
    # Fused blocks round elsewhere, so the two are near and not equal.
    assert quant.sqnr_db(latents.float(), found) > 25


def test_a_killed_evaluation_goes_on_to_the_same_bytes(
    files: dict[str, Path], evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = files["folder"] / "killed"
    made, real = 0, generate.decoded

    def stops_at_the_eleventh(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generate, "decoded", stops_at_the_eleventh)
    gate = files["folder"] / "loose.toml"
    result = evaluate(files, out, "--gate", gate)
    assert result.exit_code == 130
    assert "goes on from here" in result.output
    result = evaluate(files, out, "--judge", "mini.judge:oracle")
    assert result.exit_code == 1
    assert "the judge oracle failed: 'the a' is not a caption" in result.output
    assert "leave it out" in result.output
    result = evaluate(files, out, "--gate", gate)
    assert result.exit_code == 0, result.output
    assert made == 11 + 6
    names = [path.relative_to(evaluation) for path in evaluation.rglob("*") if path.is_file()]
    assert len(names) > 30
    for name in names:
        assert (out / name).read_bytes() == (evaluation / name).read_bytes(), name
    result = evaluate(files, out)
    assert result.exit_code == 1
    assert "finished" in result.output


def test_videos_of_a_batch_are_decoded_one_by_one(
    tiny_pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that decoding takes must not grow with the batch."""
    vae, sizes = tiny_pipe.vae.float(), []
    decode = vae.decode

    def watched(latents: torch.Tensor) -> Any:
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(vae, "decode", watched)
    latents = torch.randn(3, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    together = generate.decoded(vae, latents)
    assert sizes == [1, 1, 1]
    assert [each.shape for each in together] == [(5, 32, 32, 3)] * 3
    for each, alone in zip(together, torch.split(latents, 1), strict=True):
        assert (each == generate.decoded(vae, alone)[0]).all()


@pytest.fixture(scope="module")
def points(files: dict[str, Path]) -> Path:
    out = files["folder"] / "points"
    result = run(
        *("record", "--model", files["model"], "--keep", "1", "--out", out, "--steps", "4"),
        *("--prompts", files["folder"] / "unseen.txt", *SMALL[2:]),
    )
    assert result.exit_code == 0, result.output
    return out


def test_a_gate_that_is_not_kept_ends_with_three(files: dict[str, Path], points: Path) -> None:
    """Two candidates that are the same model, a gate, and the velocity error: all in one run."""
    gate = files["folder"] / "strict.toml"
    gate.write_text("[psnr]\nmin = 99\n[temporal-flickering]\nmin_difference = 0.5\n")
    out = files["folder"] / "gated"
    packed = files["folder"] / "packed"
    result = run(
        *("convert", "--model", files["model"], "--scales", files["scales"], "--out", packed),
        *("--recipe", _recipe_file(files)),
    )
    assert result.exit_code == 0, result.output
    options = (
        "--points",
        points,
        "--gate",
        gate,
        "--calibration-prompts",
        files["folder"] / "prompts.txt",
    )
    result = evaluate(
        files, out, "--candidate", f"again={files['scales']}", *options, scales=f"packed={packed}"
    )
    assert result.exit_code == 3, result.output
    assert result.output.count("gate: ") == 4
    results = read_results(out, "evaluate")
    assert len(results["gate"]["broken"]) == 4
    same = [each for each in results["comparisons"] if each["second"] == "again"]
    assert {each["judge"] for each in same} == {*JUDGES, "velocity-error"}
    for each in same:  # a packed checkpoint is the same model
        assert "equal in every sample" in each["words"]
    measure = results["measures"]["velocity-error"]
    bf16, w8a8 = (measure["candidates"][name] for name in ("bf16", "packed"))
    assert 0 < bf16["mean"] < w8a8["mean"] < 20
    assert (w8a8["prompts"], w8a8["values"]) == (8, 16)


def test_a_packed_candidate_is_judged_by_its_own_sparse_recipe(
    files: dict[str, Path], tmp_path: Path, tiny_pipe: WanPipeline
) -> None:
    recipe, packed = tmp_path / "sparse.toml", tmp_path / "packed"
    text = (
        _recipe_file(files)
        .read_text()
        .replace('format = "hif8"\n', 'format = "hif8"\nattention = "sparse"\n')
    )
    recipe.write_text(
        f"{text}\n[sparse]\nshare_of_mass = 0.9\ntile = [1, 2, 2]\n"
        "every_steps = 1\ndense_steps = 2\n"
    )
    result = run(
        *("convert", "--model", files["model"], "--scales", files["scales"], "--out", packed),
        *("--recipe", recipe),
    )
    assert result.exit_code == 0, result.output
    fingerprint = quant.model_fingerprint(files["model"])
    candidate = Candidate.read(f"sparse={packed}", files["model"], fingerprint)
    dense = Candidate.read(f"dense={files['scales']}", files["model"], fingerprint)
    assert candidate.scales.recipe.sparse is None
    assert candidate.identity.split()[0] != dense.identity.split()[0]
    built = candidate.build(tiny_pipe.transformer)
    assert quant.sparse_attention_of(built) is not None
    dense.check_attention(2, tmp_path)
    candidate.check_attention(3, None)
    with pytest.raises(StudyError, match="sparse has sparse attention, whose loss"):
        candidate.check_attention(3, tmp_path)
    result = evaluate(files, tmp_path / "out", scales=f"sparse={packed}")
    assert result.exit_code == 1
    assert "with 2 steps none would have it: give --steps 3" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def _recipe_file(files: dict[str, Path]) -> Path:
    text = Path("quant/recipe/presets/boundary-hif8.toml").read_text()
    text = text.replace("total_blocks = 40", "total_blocks = 4").replace(
        "[0, 1, 37, 38, 39]", "[0, 3]"
    )
    path = files["folder"] / "tiny.toml"
    path.write_text(text.replace('name = "boundary-hif8"', 'name = "tiny"'))
    return path


def test_prompts_that_were_seen_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    seen = files["folder"] / "prompts.txt"
    result = run(
        *("evaluate", "--model", files["model"], "--out", tmp_path / "a", "--prompts", seen),
        *("--candidate", files["scales"], *SMALL),
    )
    assert result.exit_code == 1
    assert "the very prompts that tiny was calibrated on" in result.output
    (tmp_path / "partly.txt").write_text("\n".join([*UNSEEN, PROMPTS[4]]))
    partly = ("--prompts", tmp_path / "partly.txt", *SMALL, "--out", tmp_path / "a")
    result = run("evaluate", "--model", files["model"], "--candidate", files["scales"], *partly)
    assert result.exit_code == 1
    assert repr(PROMPTS[4]) in result.output
    alone = tmp_path / "scales" / "tiny.safetensors"
    alone.parent.mkdir()
    shutil.copy(files["scales"], alone)
    result = run("evaluate", "--model", files["model"], "--candidate", alone, *partly)
    assert result.exit_code == 1
    assert "give their file with --calibration-prompts" in result.output
    assert not (tmp_path / "a").exists()
    for name in ("bf16=", "a b="):
        result = run(
            "evaluate", "--model", files["model"], "--candidate", f"{name}{alone}", *partly
        )
        assert "cannot name a candidate" in result.output


def test_figures_put_the_papers_claims_beside_what_is_seen(
    evaluation: Path, files: dict[str, Path]
) -> None:
    out = files["folder"] / "figures"
    result = run("figures", "--evaluation", evaluation, "--out", out)
    assert result.exit_code == 0, result.output
    for ours, paper in (("scores", "figure-3"), ("grid", "figure-4")):
        source = (evaluation / "figures" / f"{ours}.png").read_bytes()
        assert (out / "figures" / f"{paper}.png").read_bytes() == source
    (claim,) = read_results(out, "figures")["claims"]
    assert claim["n"] == "8 prompts, 8 videos"
    assert claim["interval"].startswith("[")
    page = (out / "index.html").read_text()
    assert "Figure 5" in page
    assert "needs a folder of `python -m quant ablate`" in page
    assert "calibrated differently" not in page
    results = read_results(evaluation, "evaluate")
    results["unequal_calibrations"] = "The candidates were calibrated differently: <so>."
    unequal = files["folder"] / "unequal"
    shutil.copytree(evaluation, unequal)
    (unequal / "results.json").write_text(json.dumps(results))
    out = files["folder"] / "unequal figures"
    assert run("figures", "--evaluation", unequal, "--out", out).exit_code == 0
    page = (out / "index.html").read_text()
    assert '<p class="finding">The candidates were calibrated differently: &lt;so&gt;.</p>' in page
    result = run("figures", "--out", files["folder"] / "none")
    assert "at least one of --analysis" in result.output
    result = run("figures", "--analysis", evaluation, "--out", files["folder"] / "none")
    assert "where a finished 'analyze' is wanted" in result.output


def test_calibrations_that_differ_are_named(tiny_scales: Scales) -> None:
    def candidate(name: str, **changes: Any) -> Candidate:
        scales = replace(tiny_scales, **changes)
        return Candidate(name, Path(name), scales, scales.recipe)

    def of_prompts(count: int) -> dict[str, Any]:
        return {"act_amax": tiny_scales.act_amax[:, :, :count], "prompts_sha256": f"{count}" * 64}

    assert tiny_scales.sampler is not None
    first, same = candidate("first"), candidate("same")
    other = replace(tiny_scales.sampler, num_inference_steps=9, guidance_scale=1.5)
    weights_alone = candidate("int8", **of_prompts(0), sampler=None)
    assert unequal_calibrations([first, same]) is None
    assert unequal_calibrations([first, weights_alone]) is None
    assert unequal_calibrations([first, candidate("copied", prompts_file="copy.txt")]) is None
    words = unequal_calibrations([first, same, candidate("few", **of_prompts(8), sampler=other)])
    assert words is not None
    sha = tiny_scales.prompts_sha256[:8]
    assert f"prompts (first and same: 10 of prompts.txt, SHA-256 {sha}…, few: 8 of pro" in words
    assert "; steps (first and same: 4, few: 9); guidance (first and same: 3, few: 1.5)." in words
    assert "seed" not in words


def measure(name: str, needs: Any, **values: list[float]) -> Measure:
    prompts = [f"prompt {place}" for place in range(len(next(iter(values.values()))))]
    return Measure(name, "dB", True, needs, prompts, values)


def test_words_claim_no_more_than_the_interval() -> None:
    base = [float(place % 7) for place in range(40)]
    better = [each + 2 + 0.1 * (place % 3) for place, each in enumerate(base)]
    noisy = [each + (0.5 if place % 2 else -0.5) for place, each in enumerate(base)]
    judged = measure("oracle", "video", bf16=base, better=better, noisy=noisy, same=base)
    words = {(each.first, each.second): each.words() for each in compare([judged])}
    assert "better is better than bf16 on average: +2.1 dB" in words["better", "bf16"]
    assert "40 prompts do not tell noisy from bf16" in words["noisy", "bf16"]
    assert "no proof that they are equal" in words["noisy", "bf16"]
    assert "equal in every sample" in words["same", "bf16"]
    few = measure("oracle", "video", bf16=[0.0] * 4, some=[1.0, 1.1, 0.9, 1.0])
    (found,) = compare([few])
    assert found.difference.is_real  # by its interval, but four prompts cannot show it
    assert not found.is_shown
    assert "although the interval leaves out 0" in found.words()


def test_videos_that_went_another_way_are_counted() -> None:
    judged = [
        measure("psnr", "pair", w8a8=[40.0, 12.0, 33.0]),
        measure("st-lpips", "pair", w8a8=[0.0, 0.1, 0.6]),
    ]
    far = diverged(judged)
    assert far == {"w8a8": [1, 2]}
    assert "2 of 3 videos of w8a8 went another way" in divergence_words(far, 3)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no bounds"),
        ("[ssim]\nmin = 1", "no judge 'ssim'"),
        ("[psnr]\nleast = 1", "no bound 'least'"),
        ("[psnr]\nmin = 'high'", "must be a number"),
        ("[psnr]\nmin = nan", "must be finite"),
        ("[psnr]\nmin_difference = 1", "compares with BF16 already"),
        ("psnr = 3", "must be a table"),
        ("[divergence]\nmin = 1", "no bound 'min'"),
        ("[psnr", "cannot be read"),
    ],
)
def test_a_gate_that_says_nothing_sensible_is_refused(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(StudyError, match=words):
        read_gate(path, {"psnr": "pair", "oracle": "video"})


def test_units_are_what_a_folder_goes_on_from(evaluation: Path) -> None:
    lines = (evaluation / "units.jsonl").read_text().splitlines()
    units = [json.loads(line)["unit"] for line in lines]
    assert len(units) == len(set(units)) == 16 + 8 * 4
