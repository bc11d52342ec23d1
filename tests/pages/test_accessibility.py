"""Test that the checks of accessibility find what they are for, and that the pages pass them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.known_store import open_known_artifacts
from jobs.store.workers import WorkerStatus, publish_status
from service.auth.api_keys import KeyStore, Role
from service.middleware.credentials import COOKIE
from service.settings import ServiceSettings
from tests.pages.accessibility import assert_accessible, assert_reflows
from tests.pages.conftest import DESKTOP, PHONE, Visit
from tests.pages.played_worker import PlayedWorker, make_files
from tests.support.http_service import Site

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


@dataclass(frozen=True, slots=True)
class Filled:
    """A site with jobs in every state, a worker, keys and a failure.

    Attributes:
        session: the cookie of an operator.
    """

    site: Site
    session: str
    pair: str
    failed: str
    running: str


@pytest.fixture
def filled(site: Site, redis: Redis, settings: ServiceSettings, tmp_path: Path) -> Iterator[Filled]:
    _, token = KeyStore(redis).add("boss", Role.OPS)
    KeyStore(redis).add("carol", Role.USER)
    artifacts = open_known_artifacts(settings.artifacts_url, redis)
    artifacts.probe()
    headers = {"Authorization": f"Bearer {token}"}
    with (
        httpx2.Client(base_url=site.url, headers=headers) as api,
        PlayedWorker(redis, artifacts, make_files(tmp_path)) as worker,
    ):

        def ask(mode: str = "w8a8", prompt: str = "a red square moving right") -> str:
            answer = api.post("/generate", json={"prompt": prompt, "mode": mode, "seed": 7})
            return str(answer.raise_for_status().json()["id"])

        pair = [ask(mode) for mode in ("bf16", "w8a8")]
        for _ in pair:
            worker.succeed(worker.take())
        failed = ask(prompt="a blue square moving right")
        worker.take()
        worker.fail(failed, "worker_lost", "Two workers that ran it were lost.")
        running = ask()
        worker.take()
        worker.step(running, 4)
        ask()
        cancelled = ask()
        api.delete(f"/jobs/{cancelled}").raise_for_status()
        name = worker.offer.worker_id
        publish_status(redis, WorkerStatus(worker_id=name, state="busy", job_id=running))
        redis.persist(redis_keys.worker_status(name))  # nobody publishes it again
        session = httpx2.post(f"{site.url}/session", json={"key": token}).cookies[COOKIE]
        yield Filled(site, session, pair[0], failed, running)


def test_filled_pages_are_accessible(browser: Browser, filled: Filled) -> None:
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    address = {"name": COOKIE, "value": filled.session, "url": filled.site.url}
    context.add_cookies([address])  # type: ignore[list-item]
    visit = Visit(context.new_page(), filled.site.url)
    visit.watch()
    page = visit.open("/")
    expect(page.locator("#gallery-list li")).to_have_count(6)
    assert_accessible_in_all_looks(page)
    page = visit.open(f"/jobs/{filled.pair}")
    page.get_by_role("button", name="Next to its twin in w8a8").click()
    expect(page.locator("#cards video")).to_have_count(2)
    assert_accessible_in_all_looks(page)
    page = visit.open(f"/jobs/{filled.failed}")
    expect(page.locator("#cards .problem")).to_be_visible()
    assert_accessible_in_all_looks(page)
    page = visit.open(f"/jobs/{filled.running}")
    expect(page.locator("#cards .job-line")).to_contain_text("step 4")
    assert_accessible_in_all_looks(page)
    page = visit.open("/ops")
    expect(page.locator("#workers")).to_contain_text("denoising 4/8")
    expect(page.locator("#failures")).to_contain_text("Two workers that ran it were lost.")
    expect(page.locator("#keys")).to_contain_text("carol")
    assert_accessible_in_all_looks(page)
    assert_reflows(page)
    context.close()
    assert visit.faults == []


def assert_accessible_in_all_looks(page: Page) -> None:
    """Check a page in light and dark, on a desktop and a phone, without loading it again."""
    for viewport in (DESKTOP, PHONE):
        page.set_viewport_size(viewport)  # type: ignore[arg-type]
        page.emulate_media(color_scheme="light")
        assert_accessible(page)
        page.emulate_media(color_scheme="dark")
        assert_accessible(page, only=("color-contrast",))  # nothing else depends on colours
