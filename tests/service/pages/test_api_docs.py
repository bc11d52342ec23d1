"""Test the page with the API's description: nothing inline, nothing from elsewhere, all there."""

import re
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import ServiceSettings
from tests.service.conftest import MakeKey

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "media-src": "'self'",
    "font-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


class Page(HTMLParser):
    """What a page loads, and what it holds that its policy would block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href", "srcset") if name in found]
        self.inline += [name for name in found if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag in ("style", "base", "iframe", "object", "embed") else []
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)


def test_everything_that_the_page_loads_is_the_services_own(client: TestClient) -> None:
    page = Page(client.get("/docs").text)
    assert page.inline == []
    assert len(page.links) == 7
    for link in page.links:
        # Relative, so that it also works behind a proxy that adds a prefix.
        assert not urlsplit(link).netloc
        assert not link.startswith("/")
        answer = client.get(urljoin("http://testserver/docs", link), follow_redirects=False)
        assert answer.status_code == 200, link
    assert sum(link.endswith(".js") for link in page.links) == 2
    assert sum(link.endswith(".css") for link in page.links) == 2


def test_the_policy_allows_what_ships_and_nothing_else(client: TestClient) -> None:
    header = client.get("/docs").headers["content-security-policy"]
    directives = dict(each.strip().split(" ", 1) for each in header.split(";"))
    assert directives == POLICY


def test_the_page_is_asked_for_each_time_and_never_framed(client: TestClient) -> None:
    answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"


def test_the_pages_script_names_no_other_host(client: TestClient) -> None:
    links = Page(client.get("/docs").text).links
    own = next(link for link in links if link.endswith("/docs.js"))
    script = client.get(urljoin("http://testserver/docs", own)).text
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", script, flags=re.M)
    assert "validatorUrl: null" in script
    assert 'new URL("openapi.json", document.baseURI)' in script


def test_redoc_leads_to_the_same_page(client: TestClient) -> None:
    answer = client.get("/redoc", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "docs")
    assert client.get("/redoc").text == client.get("/docs").text


def test_fastapis_own_pages_are_off(client: TestClient, settings: ServiceSettings) -> None:
    assert client.get("/docs/oauth2-redirect").status_code == 404
    app = create_app(settings)
    assert (app.docs_url, app.redoc_url, app.openapi_url) == (None, None, "/openapi.json")
    for path in ("/docs", "/redoc"):
        assert not re.search("jsdelivr|googleapis|tiangolo|redoc.ly", client.get(path).text)


def test_the_page_needs_no_key_and_is_not_part_of_the_description(
    client: TestClient, make_key: MakeKey
) -> None:
    make_key("alice")
    assert client.get("/docs").status_code == 200
    described = client.get("/openapi.json").json()["paths"]
    assert not [path for path in described if re.match("/(docs|redoc|static|favicon)", path)]
