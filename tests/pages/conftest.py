"""Drive the web pages with a real browser: Debian's Chromium, through Playwright.

Nothing that a page does may go unnoticed: at the end of each test there must have been no error in
the console, no violation of the Content-Security-Policy, and no request to another host.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from service.settings import ServiceSettings
from tests.support.http_service import Site, serving

ARGUMENTS = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
expect.set_options(timeout=20_000)  # a busy machine is slow, and what is awaited comes or does not
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}


def chromium() -> str:
    """The browser that deploy/install/chromium.sh has seen to."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "there is no Chromium: run `make test`, or sh deploy/install/chromium.sh"
    return found


# For a module, not for all: while Playwright runs, no other test of this process can use asyncio.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def site(settings: ServiceSettings) -> Iterator[Site]:
    """The service on a real port, known by the address that the browser asks."""
    with serving(settings.model_copy(update={"public_url": None})) as site:
        yield site


@dataclass
class Visit:
    """A page at a site, and what went wrong on it."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.page.on("request", self._note_request)

    def open(self, path: str) -> Page:
        self.page.goto(self.url + path)
        return self.page

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _note_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != urlsplit(self.url).netloc:
            self.faults.append(f"asked another host: {request.url}")


# Each scheme and each size once, instead of each with each: enough for what a page does, not for
# how it looks.
two_looks = pytest.mark.parametrize(
    ("scheme", "viewport"),
    [("light", DESKTOP), ("dark", PHONE)],
    ids=["light-desktop", "dark-phone"],
)


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["desktop", "phone"])
def viewport(request: pytest.FixtureRequest) -> dict[str, int]:
    return DESKTOP if request.param == "desktop" else PHONE


@pytest.fixture
def visit(browser: Browser, site: Site, scheme: str, viewport: dict[str, int]) -> Iterator[Visit]:
    """A fresh profile, in each colour scheme and size."""
    context = browser.new_context(color_scheme=scheme, viewport=viewport)  # type: ignore[arg-type]
    visit = Visit(context.new_page(), site.url)
    visit.watch()
    yield visit
    context.close()
    assert visit.faults == []
