"""Test that the benchmark of the studies takes nothing of an earlier run as work of its own."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.archives import unpack
from benchmarks.speed.studies_14b import check_fresh, check_model, chosen_commands, main
from benchmarks.speed.study_bench import ANALYSIS, Bench, check_goes_on, lines


def test_what_an_earlier_run_has_left_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    check_fresh(tmp_path)
    (tmp_path / "points").mkdir()
    with pytest.raises(SystemExit, match=f"{tmp_path} holds points of an earlier run"):
        main(tmp_path, "short", "mini", device="cpu")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["points", "short"]


def test_a_model_of_another_shape_is_refused(fabricated: Path, tmp_path: Path) -> None:
    check_model(fabricated, "mini", 40)
    with pytest.raises(SystemExit, match=r"has num_layers 40, and this run is for 4: remove it"):
        check_model(fabricated, "mini", 4)
    with pytest.raises(SystemExit, match="has num_attention_heads 2, and this run is for 40"):
        check_model(fabricated, "14b", 40)
    partial = Path(shutil.copytree(fabricated, tmp_path / "partial"))
    config = partial / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_dim": 32}))
    with pytest.raises(SystemExit, match="is not a whole model: remove it"):
        check_model(partial, "mini", 40)
    shutil.rmtree(partial / "transformer")
    with pytest.raises(SystemExit, match="is not a whole model: remove it"):
        check_model(partial, "mini", 40)


def test_a_second_start_that_begins_anew_ends_with_an_error() -> None:
    kept = [b"one", b"two"]
    check_goes_on(kept, [*kept, b"three"])
    for again, words in (
        ([b"other", b"two"], "of 2 units that were finished the second start left 1"),
        ([b"one"], "of 2 units that were finished the second start left 1"),
        ([], "left 0"),
    ):
        with pytest.raises(SystemExit, match=words):
            check_goes_on(kept, again)
    with pytest.raises(SystemExit, match="had finished nothing"):
        check_goes_on([], [b"one"])


def test_what_was_measured_is_packed_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, keep, elsewhere = (tmp_path / name for name in ("work", "keep", "elsewhere"))
    for folder in (work / ANALYSIS, keep, elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (work / ANALYSIS / "study.json").write_text("{}")
    (work / ANALYSIS / "units.jsonl").write_text("one\ntwo\n")
    bench = Bench(work, "cpu", 80, {"part": "whole"}, keep / "kept.tar.xz", ends=0)
    with pytest.raises(SystemExit, match="time is up during record: what was measured before"):
        bench.run("record", "record")
    (saved,) = keep.glob("*.json")
    assert "record: seconds until the run's end cut it" in saved.read_text()
    unpack(keep / "kept.tar.xz", elsewhere)
    assert lines(elsewhere / ANALYSIS / "units.jsonl") == [b"one", b"two"]
    assert (elsewhere / "record.log").exists()


def test_commands_are_chosen_with_what_they_need() -> None:
    assert chosen_commands("calibrate") == {"calibrate"}
    for text, words in (("analyze", "needs the points of record"), ("ablate", "has ablate")):
        with pytest.raises(SystemExit, match=words):
            chosen_commands(text)
