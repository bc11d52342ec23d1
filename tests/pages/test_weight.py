"""Test that the first load of each page stays light: the bytes that come over the wire."""

from playwright.sync_api import Browser, Response

from service.pages.page_routes import OWN_PAGES, SHARED_PAGES
from tests.pages.conftest import DESKTOP
from tests.support.http_service import Site

MOST_BYTES = 150_000
VIDEO = ("video/", "image/")  # what a page is about, not what it is made of


def first_load(browser: Browser, url: str) -> dict[str, int]:
    """The bytes of each answer of a first visit, headers included, without video and pictures."""
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    page = context.new_page()
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))  # noqa: PLW0108 (not a builtin)
    page.goto(url)
    page.locator("#who > *").first.wait_for(state="attached")
    page.wait_for_timeout(500)
    weighed: dict[str, int] = {}
    for answer in answers:
        kind = answer.header_value("content-type") or ""
        if not kind.startswith(VIDEO) and kind != "text/event-stream":
            sizes = answer.request.sizes()
            weighed[answer.url] = sizes["responseBodySize"] + sizes["responseHeadersSize"]
    context.close()
    return weighed


def test_every_page_is_light(browser: Browser, site: Site) -> None:
    paths = [path.format(job_id="none", comparison_id="none") for path in SHARED_PAGES]
    weights = {path: first_load(browser, site.url + path) for path in [*paths, *OWN_PAGES]}
    for path, weighed in weights.items():
        print(f"{path}: {sum(weighed.values()) / 1000:.1f} kB in {len(weighed)} answers")  # noqa: T201
    assert all(len(weighed) > 3 for weighed in weights.values()), "script and styles were counted"
    heavy = {path: each for path, each in weights.items() if sum(each.values()) > MOST_BYTES}
    assert heavy == {}
