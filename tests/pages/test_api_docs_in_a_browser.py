"""Test that a real browser shows the API's description, with nothing from another host."""

import pytest

from tests.pages.conftest import DESKTOP, Visit, two_looks


@two_looks
def test_operations_are_listed_and_open_within_the_screen(visit: Visit) -> None:
    page = visit.open("/docs")
    page.get_by_text("Ask for a video").first.wait_for()
    operation = page.locator("#operations-jobs-generate_generate_post, .opblock-post").first
    operation.locator("button").first.click()
    operation.get_by_text("Request body").wait_for()
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wider <= 0, f"the page is {wider} px wider than the screen"


@pytest.mark.parametrize(("scheme", "viewport"), [("light", DESKTOP)])
def test_the_other_address_leads_to_the_same_page(visit: Visit) -> None:
    page = visit.open("/redoc")
    page.locator(".opblock").first.wait_for()
    assert page.url == visit.url + "/docs"
