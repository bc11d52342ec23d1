"""What the layout of the code promises beyond the import contracts in pyproject.toml."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "service", "worker", "quant", "mini", "deploy", "benchmarks")
MOST_ENTRIES = 15
MOST_LINES = 400


MODULES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)


def test_there_is_something_to_check() -> None:
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)


def test_no_folder_holds_more_than_fits_into_a_glance() -> None:
    folders = {path.parent for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py")}
    entries = {
        str(folder.relative_to(ROOT)): sum(
            not each.name.startswith(("__", ".")) or each.name == "__main__.py"
            for each in folder.iterdir()
        )
        for folder in folders
    }
    assert {folder: count for folder, count in entries.items() if count > MOST_ENTRIES} == {}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_says_what_it_does_and_is_no_longer_than_it_should_be(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "it has no docstring"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parts[:2] in (("quant", "kernels"), ("quant", "numerics"))],
    ids=str,
)
def test_kernels_and_numerics_open_no_files(path: Path) -> None:
    """The import contract forbids libraries that do; these functions need no further import."""
    calls = [
        node.lineno
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("open", "torch.load", "torch.save")
    ]
    assert calls == []
