"""Test how the studies of a card are put together, stopped in time, packed and taken up again."""

import json
import tarfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from benchmarks.archives import packed
from benchmarks.quality import study_parts
from benchmarks.quality.miniature import MODEL as MINIATURE
from benchmarks.quality.studies_card import REHEARSAL, WHOLE, Card, Extent, main
from benchmarks.quality.study_parts import FAILED, FINISHED, LEFT, STOPPED, Part, Shop
from quant.cli import app
from quant.studies.output.page import Page
from quant.studies.output.study_folder import StudyFolder
from quant.studies.qat.grid import read_grid

MODEL, SCALES, WORK = Path("/model"), Path("/scales"), Path("/work")
IDENTITY = {"model": "one", "device": "cpu"}


@pytest.mark.parametrize("extent", [WHOLE, REHEARSAL])
def test_the_toolkit_takes_every_command(extent: Extent) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = Card(MODEL, SCALES, WORK, "cuda", extent).parts()
    commands = [words for part in parts for words in part.commands]
    assert len(commands) == 17
    for module, command, *options in commands:
        assert module == "quant"
        known[command].make_context(command, list(map(str, options)))
    assert [len(read_grid(Path(str(words[1]))).runs) for words in WHOLE.grids] == [27, 16]


def test_a_part_waits_for_what_it_reads() -> None:
    parts = {each.name: each for each in Card(MODEL, SCALES, WORK, "cuda", WHOLE).parts()}
    written = {name: _paths(part, {"--out"}) for name, part in parts.items()}
    for name, part in parts.items():
        before = {each for other in (name, *part.after) for each in written[other]}
        read = {path for path in _paths(part) if path.suffix != ".txt"}
        assert read <= before | {MODEL}, name
        assert not part.is_study or WORK / name in written[name]


def _paths(part: Part, options: set[str] | None = None) -> set[Path]:
    """Return the paths of a part's options, or of some of them."""
    named = options or {"--out", "--points", "--calibration", "--analysis", "--training", "--model"}
    return {
        Path(str(value))
        for words in part.commands
        for option, value in pairwise(words)
        if option in named
    }


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    for name in ("work", "keep"):
        (tmp_path / name).mkdir()
    (tmp_path / "good.json").write_text("{}")
    return Shop(tmp_path / "work", tmp_path / "keep", time.monotonic() + 60, IDENTITY, least_s=0)


def test_parts_run_after_what_they_need_and_are_stopped_in_time(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = tmp_path / "good.json", tmp_path / "out.json"
    parts = [
        Part("second", (("json.tool", out),), 30, after=("first",)),
        Part("first", (("json.tool", good, out),), 30, is_study=False),
        Part("wrong", (("json.tool", tmp_path / "missing.json"),), 30),
        Part("behind", (("json.tool", good),), 30, after=("wrong",)),
        Part("endless", (("http.server", "0", "--bind", "127.0.0.1"), ("json.tool", good)), 1.5),
        Part("other", (("json.tool", good),), 30),
    ]
    shop.run(parts, {part.name for part in parts} - {"other"}, together=2)
    assert shop.states == {
        "first": FINISHED,
        "second": FINISHED,
        "wrong": FAILED,
        "behind": LEFT,
        "endless": STOPPED,
    }
    assert "Keyboard interrupt received" in (shop.work / "endless.0.log").read_text(), "softly"
    assert "missing.json" in capsys.readouterr().err, "why it has failed"
    summary = json.loads((shop.keep / "summary.json").read_text())
    assert summary["second"]["state"] == FINISHED
    out.unlink()  # a part that is finished does not run again
    late = Shop(shop.work, shop.keep, time.monotonic() + 10, IDENTITY)
    late.run(parts, {"first", "endless"}, together=2)
    assert late.states == {"first": FINISHED, "endless": LEFT}


def test_a_stopped_study_goes_on_from_its_archive_elsewhere(shop: Shop, tmp_path: Path) -> None:
    part = Part("methods", ((), ()), 1)
    folder = StudyFolder.open(shop.work / "methods", "compare-methods", {"model": "one"})
    folder.keep("hif8/0", 1.5)
    (folder.path / "weights.safetensors").write_bytes(b"large")
    for name in ("methods.0.done", "methods.0.log", "methods-other.0.log"):
        (shop.work / name).touch()
    shop.pack(part)
    assert _names(shop, "methods") == {
        *("methods.0.log", "methods/study.json", "methods/units.jsonl"),
    }
    for name in ("elsewhere", "third"):
        (tmp_path / name).mkdir()
    elsewhere = replace(shop, work=tmp_path / "elsewhere")
    elsewhere.unpack(shop.keep)
    again = StudyFolder.open(elsewhere.work / "methods", "compare-methods", {"model": "one"})
    assert again.unit("hif8/0") == 1.5
    assert not elsewhere.is_finished(part)

    shop.pack(replace(part, goes_on=False))
    assert _names(shop, "methods") == {"methods.0.log"}
    folder.finish({"found": 1}, {}, {}, Page("A study", "of nothing"))
    (shop.work / "methods.1.done").touch()
    shop.pack(replace(part, goes_on=False))
    assert {"methods/results.json", "methods/index.html"} < _names(shop, "methods")
    elsewhere.unpack(shop.keep)
    assert not elsewhere.is_finished(part), "what is there is not overwritten"
    third = replace(shop, work=tmp_path / "third")
    third.unpack(shop.keep)
    assert third.is_finished(part)
    shop.pack(replace(part, is_study=False))  # points stay: their commands have to run elsewhere
    assert _names(shop, "methods") == {"methods.0.log"}


def test_other_studies_are_neither_gone_on_with_nor_taken_over(shop: Shop, tmp_path: Path) -> None:
    (shop.work / "analyze.0.done").touch()
    shop.pack(Part("analyze", ((),), 1))
    for name, value in (("model", "two"), ("device", "cuda")):
        other = IDENTITY | {name: value}
        with pytest.raises(ValueError, match=f"work holds studies of another {name}, or"):
            replace(shop, identity=other)
        work = tmp_path / name
        work.mkdir()
        elsewhere = Shop(work, shop.keep, shop.ends, other)
        with pytest.raises(ValueError, match=f"analyze.tar.xz holds studies of another {name}"):
            elsewhere.unpack(shop.keep)
        assert [each.name for each in work.iterdir()] == ["studies.json"]
    (shop.work / "studies.json").unlink()
    (shop.work / "analyze.0.log").touch()
    with pytest.raises(ValueError, match="or does not say which"):
        replace(shop)


def test_the_identity_tells_a_rehearsal_and_other_scales_apart(tmp_path: Path) -> None:
    scales = tmp_path / "scales"
    card = Card(MINIATURE, scales, WORK, "cpu", REHEARSAL)
    known = card.identity()
    scales.write_bytes(b"new")
    assert card.identity() == known | {"set of scales": card.identity()["set of scales"]} != known
    assert replace(card, extent=WHOLE).identity()["extent"] != known["extent"]
    assert str(Path.cwd()) not in json.dumps(replace(card, extent=WHOLE).identity())


def test_parts_whose_prerequisites_are_missing_are_not_a_success(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part could begin: choose analyze, points, too"):
        main(
            tmp_path / "work",
            tmp_path / "keep",
            parts="methods",
            together=1,
            device="cpu",
            seconds=60,
            kept=None,
            model=MINIATURE,
            scales=None,
        )


def test_an_archive_that_would_be_too_large_leaves_its_units(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder.open(shop.work / "analyze", "analyze", {})
    folder.keep("a", list(range(5000)))
    files = [folder.path / "study.json"]
    monkeypatch.setattr(study_parts, "MOST_BYTES", len(packed(shop.work, files)) + 100)
    shop.pack(Part("analyze", ((),), 1))
    assert _names(shop, "analyze") == {"analyze/study.json"}


def _names(shop: Shop, part: str) -> set[str]:
    with tarfile.open(shop.keep / f"{part}.tar.xz") as tar:
        names = set(tar.getnames())
    assert "studies.json" in names, "what it is of"
    return names - {"studies.json"}


def test_an_unknown_part_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--parts has other: take some of points, evaluate"):
        main(tmp_path / "work", tmp_path / "keep", parts="points,other")
    assert not list((tmp_path / "keep").iterdir())
