"""Take a picture of every page and state.

.venv/bin/python -m tests.pages.pictures.screenshots FOLDER [NAME ...]

It runs the whole system with the miniature on free ports and fills it; `make screenshots` calls it.
With NAMEs only the scenes are taken whose name holds one of them. With SITE=URL it takes pictures
of a service that runs already, and fills that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Error, sync_playwright
from rich.console import Console

from deploy.local.session import throwaway_stack
from deploy.local.signals import handle_signals
from deploy.local.stack import WORKER_CONFIG
from tests.pages.conftest import ARGUMENTS, DESKTOP, PHONE, chromium
from tests.pages.pictures.scenes import SCENES, Scene
from tests.pages.pictures.stock import Stock

SCHEMES = ("light", "dark")
SIZES = {"desktop": DESKTOP, "phone": PHONE}
LOADING = '[aria-busy="true"]:visible, .empty:visible:has-text("Loading")'
SETTLED_MS = 1200


@contextmanager
def running_site() -> Iterator[str]:
    """The URL of a service with a worker, until the end of the block."""
    if url := os.environ.get("SITE"):
        yield url
        return
    with handle_signals() as signals, throwaway_stack(Console(), WORKER_CONFIG, signals) as stack:
        yield stack.config.service_url


def take(browser: Browser, scene: Scene, url: str, scheme: str, size: str, path: Path) -> None:
    """Bring a fresh browser into the state, and keep a picture of the whole page.

    While Chromium takes one, a touch screen counts as a mouse: what only mice get to see, such as
    the keys of a vote, is in a phone's pictures, below the height that the page had without it.
    """
    context = browser.new_context(
        color_scheme=scheme,  # type: ignore[arg-type]
        viewport=SIZES[size],  # type: ignore[arg-type]
        has_touch=size == "phone",
        device_scale_factor=1 if size == "desktop" else 2,
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    try:
        scene.before(page)
        page.goto(url)
        page.locator("#who > *").or_(page.locator("#api > *")).first.wait_for(state="attached")
        page.locator(LOADING).first.wait_for(state="hidden")
        page.wait_for_timeout(SETTLED_MS)
        scene.act(page)
        page.wait_for_timeout(SETTLED_MS)
        page.screenshot(path=path, full_page=True)
    finally:
        context.close()


def main() -> None:
    """Take them all, tell which could not be taken, and fail if there were any."""
    folder, wanted = Path(sys.argv[1]), sys.argv[2:] or [""]
    folder.mkdir(parents=True, exist_ok=True)
    missed: list[str] = []
    with running_site() as site, sync_playwright() as playwright:
        stock = Stock(site)
        try:
            stock.fill()
        except httpx.HTTPStatusError as error:
            missed.append(f"what the pages show: {error}")
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        for scene in (each for each in SCENES if any(name in each.name for name in wanted)):
            for scheme in SCHEMES:
                for size in SIZES:
                    name = f"{scene.name}-{scheme}-{size}"
                    try:
                        url = site + scene.path.format(**stock.names)
                        take(browser, scene, url, scheme, size, folder / f"{name}.png")
                    except (Error, KeyError) as error:
                        missed.append(f"{name}: {str(error).splitlines()[0]}")
        browser.close()
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
