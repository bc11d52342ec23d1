"""Look at a study's page in a real browser: what scrolls, and what shows it, on a screen only."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from quant.studies.output import page as study_page
from quant.studies.output.table import Cell, Column, Table
from tests.pages.accessibility import assert_accessible, assert_reflows
from tests.pages.conftest import DESKTOP, PHONE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A page with a table that a desktop holds and a phone does not, whose second row is marked."""
    made = study_page.Page("A study", "of tables")
    columns = (Column("judge", whole=True), *(Column(f"number {place}") for place in range(8)))
    numbers = [1000 * place for place in range(8)]
    rows: list[list[Cell]] = [[f"judge {name}", *numbers] for name in "ab"]
    made.table(Table(columns, rows, frozenset({1})))
    made.links(("prompt", "bf16"), [("a circle", [{"7": "videos/bf16/0 0.mp4"}])])
    (tmp_path / "index.html").write_text(made.html(), encoding="utf-8")
    (tmp_path / "videos" / "bf16").mkdir(parents=True)
    (tmp_path / "videos" / "bf16" / "0 0.mp4").write_text("here")
    return tmp_path / "index.html"


def shades(table: Locator, row: int) -> list[int]:
    """Return how light the right edge of a row is, from 0 to 255, from left to right."""
    picture = Image.open(io.BytesIO(table.screenshot())).convert("L")
    box = table.locator("tr").nth(row).bounding_box()
    outer = table.bounding_box()
    assert box
    assert outer
    y = int(box["y"] - outer["y"] + 3)  # above the words
    return [picture.getpixel((picture.width - x, y)) for x in (30, 10, 2)]  # type: ignore[misc]


def opened(browser: Browser, file: Path, viewport: dict[str, int], scheme: str) -> Page:
    context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(file.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_wide_table_has_a_shadow_where_it_goes_on(
    browser: Browser, file: Path, scheme: str
) -> None:
    page = opened(browser, file, PHONE, scheme)
    table = page.locator(".table").first
    for row in (1, 2):
        far, near, edge = shades(table, row)
        assert far > near + 10 > edge + 30, "in a marked row, too"
    name = table.locator("td").first
    before = name.bounding_box()
    table.evaluate("(each) => each.scrollLeft = each.scrollWidth")
    assert name.bounding_box() == before, "the rows keep their names"
    for row in (1, 2):
        assert min(shades(table, row)) > 235, "at its end"
    assert_accessible(page)
    assert_reflows(page)


def test_a_table_that_fits_and_paper_have_none(browser: Browser, file: Path) -> None:
    page = opened(browser, file, DESKTOP, "light")
    assert min(shades(page.locator(".table").first, 1)) == 255
    page = opened(browser, file, PHONE, "light")
    page.emulate_media(media="print")
    table = page.locator(".table").first
    assert min(shades(table, 1)) == 255
    assert table.evaluate("(each) => getComputedStyle(each).overflowX") == "visible"


def test_a_link_leads_to_the_file_beside_the_page(browser: Browser, file: Path) -> None:
    page = opened(browser, file, DESKTOP, "light")
    target = page.get_by_role("link", name="7").evaluate("(each) => each.href")
    assert target == (file.parent / "videos" / "bf16" / "0 0.mp4").as_uri()
