"""Test that a study's folder goes on after a kill, and holds nothing half written."""

import csv
import json
from pathlib import Path

import pytest

from quant.errors import StudyError
from quant.studies.output.page import Page
from quant.studies.output.plots import drawing
from quant.studies.output.study_folder import StudyFolder, read_results
from quant.studies.output.table import Column, Table

IDENTITY = {"model": "sha256:1", "set of points": "a"}


def finished(path: Path) -> StudyFolder:
    folder = StudyFolder.open(path, "analyze", IDENTITY)
    page = Page("Which blocks suffer", "One model, two prompts.")
    table = Table((Column("block"), Column("error, %", 2)), [(0, 1.23456), (1, None)])
    page.table(table)
    with drawing() as figure:
        figure.axes.plot([0, 1], [2, 3])
        figure.mark_blocks([1])
    page.figure(figure.png, "A <line> & more")
    folder.finish({"answer": 42}, {"blocks": table}, {"blocks": figure.png}, page)
    return folder


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    folder.keep("block 0", {"error": 0.25})
    folder.keep("block 1", [1, 2])
    again = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    assert (again.unit("block 0"), again.unit("block 1")) == ({"error": 0.25}, [1, 2])
    assert again.unit("block 2") is None


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    folder = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    folder.keep("block 0", 1)
    with (folder.path / "units.jsonl").open("a") as file:
        file.write('{"unit": "block 1", "va')
    again = StudyFolder.open(folder.path, "analyze", IDENTITY)
    assert (again.unit("block 0"), again.unit("block 1")) == (1, None)
    again.keep("block 1", 2)
    assert StudyFolder.open(folder.path, "analyze", IDENTITY).unit("block 1") == 2


def test_results_are_read_once_they_are_whole(tmp_path: Path) -> None:
    begun = StudyFolder.open(tmp_path / "begun", "analyze", IDENTITY)
    with pytest.raises(StudyError, match="running, where a finished 'analyze' is wanted"):
        read_results(begun.path, "analyze")
    folder = finished(tmp_path / "study")
    assert read_results(folder.path, "analyze") == {"answer": 42}
    with (folder.path / "tables" / "blocks.csv").open() as file:
        assert list(csv.reader(file)) == [["block", "error, %"], ["0", "1.23456"], ["1", ""]]
    assert (folder.path / "figures" / "blocks.png").read_bytes().startswith(b"\x89PNG")
    html = (folder.path / "index.html").read_text()
    assert "<td>1.23</td>" in html
    assert "A &lt;line&gt; &amp; more" in html
    assert "src=" in html
    assert "http" not in html.replace("http-equiv", "")


def test_only_long_words_are_broken_into_lines() -> None:
    page = Page("A study", "about nothing")
    columns = (Column("verdict"), Column("claim"), Column("error", 2))
    page.table(Table(columns, [("not told apart", "as long as a sentence is " * 2, 0.5)]))
    assert '<td class="words">not told apart</td><td class="words long">as long' in page.html()
    assert "<td>0.50</td>" in page.html()
    page = Page("A study", "about nothing")
    page.table(Table((Column("judge", whole=True),), [("a judge's name " * 3,)]))
    assert '<td class="words">a judge' in page.html()


@pytest.mark.parametrize(
    ("command", "identity", "message"),
    [
        ("ablate", IDENTITY, "holds the study 'analyze', not 'ablate'"),
        ("analyze", IDENTITY | {"model": "sha256:2"}, "a study of another model: name another"),
    ],
)
def test_another_study_is_not_overwritten(
    tmp_path: Path, command: str, identity: dict[str, str], message: str
) -> None:
    folder = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    with pytest.raises(StudyError, match=message):
        StudyFolder.open(folder.path, command, identity)


def test_a_finished_study_is_not_overwritten(tmp_path: Path) -> None:
    folder = finished(tmp_path / "study")
    with pytest.raises(StudyError, match="this very study, finished"):
        StudyFolder.open(folder.path, "analyze", IDENTITY)


def test_what_is_no_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(StudyError, match="is not the folder of a study"):
        StudyFolder.open(tmp_path / "notes", "analyze", IDENTITY)
    newer = StudyFolder.open(tmp_path / "newer", "analyze", IDENTITY).path / "study.json"
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"format_version": 2}))
    with pytest.raises(StudyError, match="version 2"):
        StudyFolder.open(newer.parent, "analyze", IDENTITY)
    with pytest.raises(StudyError, match="cannot write the study's folder"):
        StudyFolder.open(tmp_path / "no" / "parent", "analyze", IDENTITY)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    with pytest.raises(StudyError, match="block 3 of analyze gave NaN"):
        folder.keep("block 3", {"error": float("nan")})
    assert folder.unit("block 3") is None


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    folder = StudyFolder.open(tmp_path / "study", "analyze", IDENTITY)
    (folder.path / "units.jsonl").symlink_to("/dev/full")
    with pytest.raises(StudyError, match="No space left on device; make room"):
        folder.keep("block 0", 1)
