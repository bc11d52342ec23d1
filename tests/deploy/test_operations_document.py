"""Test that docs/operations.md lists every environment variable with its default."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from service.settings import ServiceSettings
from worker.settings import WorkerSettings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert found, f"there is no section {title}"
    return found[1]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def variables(settings: Any) -> dict[str, Any]:
    return {str(f.validation_alias): f.default for f in settings.model_fields.values()}


READ_BY = {"service": variables(ServiceSettings), "worker": variables(WorkerSettings)}


def test_every_variable_is_in_the_table_and_nothing_else() -> None:
    found = {row[0].strip("`"): row[1] for row in rows("Environment")}
    known = {name for by in READ_BY.values() for name in by}
    assert set(found) == known
    for name, by in found.items():
        readers = [who for who, read in READ_BY.items() if name in read]
        assert by == ("both" if len(readers) == 2 else readers[0]), name


@pytest.mark.parametrize("row", rows("Environment"), ids=lambda row: row[0])
def test_the_documented_default_is_the_real_one(row: list[str]) -> None:
    name, default = row[0].strip("`"), row[2]
    for read in READ_BY.values():
        if name not in read:
            continue
        value = read[name]
        if value is PydanticUndefined:
            assert default == "required"
        elif value is None or name.endswith("_SECRET") or value == "":
            assert "`" not in default, f"{name} has no default value"
        else:
            shown = value.get_secret_value() if hasattr(value, "get_secret_value") else value
            text = str(shown).lower() if isinstance(shown, bool) else str(shown)
            assert default == f"`{text}`"
