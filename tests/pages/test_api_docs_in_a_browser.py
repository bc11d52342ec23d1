"""Test that a real browser shows the API's description, with nothing from another host."""

from tests.pages.conftest import Visit


def test_the_operations_are_listed_and_can_be_opened(visit: Visit) -> None:
    page = visit.open("/docs")
    page.get_by_text("Ask for a video").first.wait_for()
    operation = page.locator("#operations-jobs-generate_generate_post, .opblock-post").first
    operation.locator("button").first.click()
    operation.get_by_text("Request body").wait_for()


def test_no_page_is_wider_than_the_screen(visit: Visit) -> None:
    page = visit.open("/docs")
    page.locator(".opblock").first.wait_for()
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wider <= 0


def test_the_other_address_leads_to_the_same_page(visit: Visit) -> None:
    page = visit.open("/redoc")
    page.locator(".opblock").first.wait_for()
    assert page.url == visit.url + "/docs"
