"""Test that the checks of accessibility find what they are for, and that the pages pass them."""

import pytest
from playwright.sync_api import Browser, Page

from tests.pages.accessibility import assert_accessible, assert_reflows
from tests.pages.conftest import DESKTOP, Visit

GOOD = """<!doctype html><html lang="en"><head><title>Fine</title></head>
<body><main><h1>Fine</h1><p>{part}</p></main></body></html>"""


@pytest.fixture
def blank(browser: Browser) -> Page:
    return browser.new_page(viewport=DESKTOP)  # type: ignore[arg-type]


def test_a_page_without_faults_passes(blank: Page) -> None:
    blank.set_content(GOOD.format(part="Dark on light."))
    assert_accessible(blank)
    assert_reflows(blank)
    blank.close()


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ('<img src="data:,">', "image-alt"),
        ("<button></button>", "button-name"),
        ("<input>", "label"),
        ('<span style="color: #aaa; background: #fff">pale</span>', "color-contrast"),
    ],
)
def test_faults_are_found(blank: Page, part: str, rule: str) -> None:
    blank.set_content(GOOD.format(part=part))
    with pytest.raises(AssertionError, match=rule):
        assert_accessible(blank)
    blank.close()


def test_a_page_that_is_too_wide_is_found(blank: Page) -> None:
    blank.set_content(
        GOOD.format(part='<span id="w" style="display: block; width: 400px">wide</span>')
    )
    with pytest.raises(AssertionError, match="SPAN"):
        assert_reflows(blank)
    assert blank.viewport_size == DESKTOP
    blank.close()


@pytest.mark.parametrize("path", ["/", "/ops", "/rate", "/comparisons"])
def test_a_page_is_accessible(visit: Visit, path: str) -> None:
    page = visit.open(path)
    page.locator("#who > *").first.wait_for(state="attached")
    assert_accessible(page)
    assert_reflows(page)
