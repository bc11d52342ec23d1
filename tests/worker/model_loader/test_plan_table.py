"""The tables of `python -m worker plan` are those of the document, and follow the configuration."""

from pathlib import Path

import typer
from typer.testing import CliRunner

from worker.model_loader import plan_table
from worker.model_loader.plan_table import needs_table, placements_table, published_cases

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "ascend.md"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(plan_table.main)
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def test_the_document_has_the_tables() -> None:
    cases = list(published_cases())
    document = DOCUMENT.read_text(encoding="utf-8")
    for table in (needs_table(cases), placements_table(cases, [64, 32], plan_table.TAKEN_GIB)):
        assert table in document, f"python -m worker plan prints:\n{table}"


def test_a_configuration_is_planned_for_cards_of_other_sizes(config_file: Path) -> None:
    status, output = run("--config", str(config_file), "--device-gb", "8", "--device-gb", "2")
    assert status == 0
    assert "| modes | largest video, frames | 8 GiB | 2 GiB |" in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("| `bf16` + `w8a8` | 96x96, 17 | encoder on the card, VAE whole: 2.")
    assert "| too small: 2." in last, "less the 3 GiB that the system uses, nothing is left"


def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    status, output = run("--config", str(tmp_path / "none.toml"))
    assert status == 1
    assert output.startswith("worker: There is no configuration file")
    assert output.count("\n") == 1
