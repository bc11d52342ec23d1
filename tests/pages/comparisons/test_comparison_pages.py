"""Drive the pages of comparisons in a real browser: create, rate by keyboard, read the report."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from service.comparisons.model import Comparison, ComparisonState, RatingPlan
from service.comparisons.rating.raters import RaterStore
from service.comparisons.rating.votes import Answer, VoteStore
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.noninferiority import Bounds, decisive_votes_needed
from service.comparisons.store import ComparisonStore
from service.pages.page_routes import SHARED_PAGES
from service.settings import ServiceSettings
from tests.pages.accessibility import assert_accessible, assert_reflows
from tests.pages.comparisons.rated_comparison import FRAMES, store_comparison
from tests.pages.conftest import DESKTOP, PHONE, Visit
from tests.support.http_service import Site

ROOT = Path(__file__).resolve().parents[3]
SLOW_MS = 60_000
"""Of what several processes do on a busy machine."""

NOTES = """addEventListener("DOMContentLoaded", () => {
  window.notes = [];
  const note = document.querySelector("#note");
  const keep = () => notes.push(note.textContent);
  new MutationObserver(keep).observe(note, { childList: true, subtree: true });
})"""
"""Keeps what the page has said, however shortly."""

on_desktop = pytest.mark.parametrize(("scheme", "viewport"), [("light", DESKTOP)])
on_phone = pytest.mark.parametrize(("scheme", "viewport"), [("dark", PHONE)])
Seat = tuple[Comparison, str, str]
MakeSeat = Callable[..., Seat]


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Let pages take their time on a busy machine."""
    expect.set_options(timeout=30_000)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture
def twin_worker(settings: ServiceSettings, tmp_path: Path) -> Iterator[None]:
    """A worker process with two modes."""
    command = [sys.executable, "-m", "tests.service.comparisons.twin_worker", "0"]
    environment = {
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "ARTIFACTS_URL": str(settings.artifacts_url),
    }
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
        )
        yield
        worker.kill()
        worker.wait()


@pytest.fixture
def make_seat(redis: Redis, settings: ServiceSettings, tmp_path: Path) -> MakeSeat:
    """Store a comparison that is ready, with one rater; return it, the rater's id and the link."""

    def make(prompts: int = 2, **plan: Any) -> Seat:
        rating = RatingPlan(**{"training": 0, "gold": 0, "identical": 0, "repeat_share": 0} | plan)
        artifacts = open_artifacts(str(settings.artifacts_url))
        comparison = store_comparison(redis, artifacts, tmp_path, prompts, rating=rating)
        rater, token = RaterStore(redis).add(comparison.id, "Ada")
        return comparison, rater.id, f"/rate#{token}"

    return make


class RaterPage:
    """The page of a rater, and what a rater does on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.message = page.locator("#message")

    def start(self, link: str, site: Site) -> None:
        self.page.goto(site.url + link)
        self.page.get_by_role("button", name="Start").click()
        self.wait_for_pair()

    def wait_for_pair(self) -> None:
        """Wait until both videos of a pair are shown."""
        expect(self.page.locator("#criteria:not([inert])")).to_be_visible(timeout=SLOW_MS)
        expect(self.page.locator(".player-count")).to_have_text(
            re.compile(r"^\d+ / \d+$"), timeout=SLOW_MS
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def chosen(self) -> list[str]:
        """The answers that are given on the page, by criterion, as in ["left", "tie"]."""
        radios = self.page.locator("#criteria input:checked")
        return [str(radio.get_attribute("value")) for radio in radios.all()]

    def note(self) -> Locator:
        return self.page.locator("#note")


@contextmanager
def another_browser(browser: Browser, site: Site, *expected: str) -> Iterator[Page]:
    """A page of another profile; `expected` are the texts of errors that it may log."""
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    visit = Visit(context.new_page(), site.url)
    visit.watch()
    yield visit.page
    context.close()
    assert [each for each in visit.faults if not any(text in each for text in expected)] == []


def answers(redis: Redis, comparison: Comparison, rater_id: str) -> list[Answer]:
    return VoteStore(redis).answers(comparison.id, rater_id)


@on_desktop
def test_a_comparison_is_created_rated_and_reported(
    visit: Visit, browser: Browser, site: Site, twin_worker: None, redis: Redis
) -> None:
    page = visit.open("/comparisons")
    wait_until(lambda: page.request.get(f"{site.url}/models").json()["models"], 60)
    page.get_by_role("button", name="New comparison").click()
    page.get_by_label("Title").fill("Is twin as good as plain?")
    expect(page.get_by_label("Reference")).to_have_value("0")
    page.get_by_label("Prompts, one a line").fill("a cat\na dog\na cup\na tree")
    expect(page.locator("#plan")).to_contain_text("4 prompts × 1 seeds = 4 pairs, 8 videos")
    page.get_by_text("What raters are shown").click()
    for label, value in {"Training": 1, "Shown twice": 0, "Identical": 0, "Gold": 1}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="Create and start").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Is twin as good as plain?")
    expect(page.locator("#counts")).to_contain_text("4 ready", timeout=2 * SLOW_MS)
    assert page.locator("#pairs tbody tr").count() >= 4

    page.get_by_label("Name of a rater").fill("Ada")
    page.get_by_role("button", name="Add rater").click()
    link = page.get_by_label("Link for Ada").input_value()
    with another_browser(browser, site) as other:
        rater = RaterPage(other)
        rater.start(link.removeprefix(site.url), site)
        expect(other.locator("#prompt")).to_contain_text("Practice")
        for _ in range(1 + 4 + 1):
            rater.wait_for_pair()
            # The focus is on the form: nothing has to be clicked before a key works.
            rater.press(*["ArrowLeft"] * (len(BY_ID) - 1), "ArrowDown")
            expect(other.locator("#missing")).to_contain_text("All answered")
            rater.press("Enter")
        expect(rater.message).to_contain_text("that was all", timeout=SLOW_MS)
        expect(rater.message).to_contain_text("5 pairs")

    expect(page.locator("#raters")).to_contain_text("5 of 5", timeout=SLOW_MS)
    page.get_by_role("link", name="Report").click()
    expect(page.locator(".sentence")).to_contain_text(
        "do not show whether twin is as good as plain", timeout=SLOW_MS
    )
    expect(page.locator(".conclusion")).to_contain_text("of 1 rater on 4 of 4 pairs")
    overall = page.get_by_role("row", name=re.compile("^Overall 4 0 "))
    expect(overall.first).to_be_visible()  # four votes, all of them ties
    rows = page.locator("section", has_text="By prompt, the worst first").locator("tbody tr")
    expect(rows).to_have_count(4)
    rows.first.get_by_role("button", name="Watch").click()
    expect(page.locator("#watch-sides")).to_contain_text("candidate: twin")
    expect(page.locator("#watch .player-count")).to_have_text(
        re.compile(r"\d / 9"), timeout=SLOW_MS
    )
    exported = page.request.get(
        page.get_by_role("link", name="as JSON lines").evaluate("link => link.href")
    )
    assert exported.text().count('"twin"') + exported.text().count("a cat") > 0


@on_desktop
def test_a_refused_file_says_its_lines_and_creates_nothing(
    visit: Visit, offer: WorkerOffer, redis: Redis
) -> None:
    page = visit.open("/comparisons")
    catalog.publish(redis, offer)  # now, because it is taken for dead after a while
    page.get_by_role("button", name="New comparison").click()
    page.get_by_label("Title").fill("Refused")
    page.get_by_label("From a file").check()
    page.get_by_role("button", name="Create and start").click()
    expect(page.locator("#refused")).to_contain_text("No file is chosen")
    table = "prompt,seed\r\na cat,1\r\n,2\r\na dog,many\r\n".encode("utf-8-sig")
    name = "prompts-of-the-second-round-" + "as-ops-wrote-them-" * 5 + ".csv"
    file = FilePayload(name=name, mimeType="text/csv", buffer=table)
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Create and start").click()
    refused = page.locator("#refused li")
    expect(refused).to_have_count(2)
    expect(refused.nth(0)).to_contain_text("Line 3 has no prompt")
    expect(refused.nth(1)).to_contain_text("Line 4 has many")
    expect(page.locator("#file")).to_have_attribute("aria-invalid", "true")
    assert_reflows(page)  # with a long name of a file, and with lines that are refused
    assert ComparisonStore(redis).list().comparisons == ()
    visit.faults.remove(next(each for each in visit.faults if "422" in each))

    # Latin-1, as Excel saves it
    table = b"prompt;seeds\r\na \xe4pple;1 2\r\n"
    page.locator("#file").set_input_files({**file, "buffer": table})
    page.get_by_role("button", name="Create and start").click()
    expect(page.locator("#counts")).to_contain_text("of 2 pairs")
    expect(page.locator("#pairs")).to_contain_text("a äpple")


@on_desktop
def test_the_form_tells_how_many_votes_a_margin_needs(visit: Visit) -> None:
    page = visit.open("/comparisons")
    page.get_by_role("button", name="New comparison").click()
    hint = page.locator("#margin-hint")
    for points in (49, 20, 15, 10, 7.5, 5, 1):
        page.get_by_label("Margin").fill(str(points))
        needed = decisive_votes_needed(Bounds(points / 100))
        expect(hint).to_contain_text(f"about {needed:,} decisive votes")
    page.locator("#statistics summary").click()
    for points, level, power in [(10, 0.1, "99"), (10, 20, "60"), (7.5, 2.5, "90"), (20, 1, "")]:
        page.get_by_label("Margin").fill(str(points))
        page.get_by_label("Level").fill(str(level))
        page.get_by_label("Power").fill(power)
        needed = decisive_votes_needed(Bounds(points / 100, level / 100, float(power or 80) / 100))
        expect(hint).to_contain_text(f"about {needed:,} decisive votes")


@on_desktop
def test_the_advanced_statistics_are_stored(visit: Visit, offer: WorkerOffer, redis: Redis) -> None:
    page = visit.open("/comparisons")
    catalog.publish(redis, offer)  # now, because it is taken for dead after a while
    page.get_by_role("button", name="New comparison").click()
    page.get_by_label("Title").fill("Stricter than usual")
    page.get_by_label("Prompts, one a line").fill("a cat")
    page.locator("#statistics summary").click()
    expect(page.get_by_label("Level")).to_have_attribute("placeholder", "5")
    for label, percent in {"Level": "2.5", "Power": "90", "Frames seen": "75"}.items():
        page.get_by_label(label).fill(percent)
    page.get_by_role("button", name="Create and start").click()
    expect(page.locator("#design")).to_contain_text("2.5 % one-sided, power 90 %")
    comparison_id = urlsplit(page.url).path.split("/")[-1]
    stored = page.request.get(f"{visit.url}/comparisons/{comparison_id}").json()
    assert (stored["alpha"], stored["power"]) == (0.025, 0.9)
    assert stored["rating"]["least_seen"] == 0.75


def test_the_form_has_the_criteria_of_the_statistics() -> None:
    template = ROOT / "service/pages/templates" / SHARED_PAGES["/comparisons"]
    text = html.unescape(template.read_text(encoding="utf-8"))
    pattern = r'name="criteria" value="(\w+)" checked><span><b>([^<]+)</b> ([^<]+)</span>'
    assert re.findall(pattern, text) == [
        (each.id, each.name, each.definition) for each in BY_ID.values()
    ]


@on_desktop
def test_a_comparison_is_steered(visit: Visit, make_seat: MakeSeat, redis: Redis) -> None:
    comparison, _, _ = make_seat()
    page = visit.open(f"/comparisons/{comparison.id}")
    state = page.locator("#state")
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("running")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Keep it as it is").click()
    expect(state).to_have_text("running")
    page.get_by_role("button", name="Remove Ada").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(page.locator("#raters")).to_contain_text("removed")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(state).to_have_text("closed")
    page.get_by_role("button", name="Clone").click()
    expect(page).not_to_have_url(re.compile(comparison.id))
    expect(state).to_have_text("paused")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#list tbody tr")).to_have_count(1)
    assert ComparisonStore(redis).list().comparisons[0].id == comparison.id


@on_desktop
def test_a_step_that_is_refused_is_explained(
    visit: Visit, make_seat: MakeSeat, redis: Redis
) -> None:
    comparison, _, _ = make_seat()
    page = visit.open(f"/comparisons/{comparison.id}")
    page.get_by_role("button", name="Close").click()
    ComparisonStore(redis).change_state(
        comparison.id, ComparisonState.CANCELLED, [ComparisonState.RUNNING]
    )
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(page.locator("#state")).to_have_text("cancelled")
    expect(page.locator("#note")).to_contain_text("cancelled")
    visit.faults.remove(next(each for each in visit.faults if "409" in each))


@on_desktop
def test_a_closed_page_loses_nothing(
    visit: Visit, site: Site, make_seat: MakeSeat, redis: Redis
) -> None:
    comparison, rater_id, link = make_seat()
    rater = RaterPage(visit.page)
    rater.start(link, site)
    prompt = rater.page.locator("#prompt").text_content()
    rater.press("ArrowLeft", "ArrowDown", "ArrowRight")
    rater.page.close()

    again = RaterPage(visit.page.context.new_page())
    again.start(link, site)
    expect(again.page.locator("#prompt")).to_have_text(prompt or "")
    assert again.chosen() == ["left", "tie", "right"]
    again.press("4", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter")
    expect(again.page.locator("#count")).to_have_text("1 of 2 rated")
    (answer,) = answers(redis, comparison, rater_id)
    assert list(answer.choices.values()) == ["left", "tie", "right", "left", "left", "left"]
    seen = answer.provenance
    assert seen.frames_seen is not None
    assert 1 <= min(seen.frames_seen) <= max(seen.frames_seen) <= FRAMES
    assert seen.viewport == (DESKTOP["width"], DESKTOP["height"])


@on_desktop
def test_another_device_goes_on(
    visit: Visit, browser: Browser, site: Site, make_seat: MakeSeat
) -> None:
    _, _, link = make_seat(prompts=3)
    first = RaterPage(visit.page)
    first.start(link, site)
    first.press("k")
    expect(first.page.locator("#count")).to_have_text("1 of 3 rated")
    first.wait_for_pair()
    prompt = first.page.locator("#prompt").text_content()
    with another_browser(browser, site) as page:
        page.goto(site.url + link)
        second = RaterPage(page)
        second.wait_for_pair()  # no instructions once there are answers
        expect(page.locator("#prompt")).to_have_text(prompt or "")


@on_desktop
def test_a_vote_waits_for_a_service_that_is_away(
    browser: Browser, site: Site, make_seat: MakeSeat, redis: Redis, scheme: str, viewport: object
) -> None:
    comparison, rater_id, link = make_seat()
    with another_browser(browser, site, "ERR_INTERNET_DISCONNECTED") as page:
        rater = RaterPage(page)
        rater.start(link, site)
        page.context.set_offline(True)
        rater.press(*["ArrowRight"] * len(BY_ID), "Enter")
        expect(rater.note()).to_contain_text("Your answer is kept")
        rater.press("ArrowLeft")  # what is being sent does not change any more
        assert answers(redis, comparison, rater_id) == []
        page.context.set_offline(False)
        expect(page.locator("#count")).to_have_text("1 of 2 rated", timeout=SLOW_MS)
        expect(rater.note()).to_be_empty()
        (answer,) = answers(redis, comparison, rater_id)
        assert set(answer.choices.values()) == {"right"}


@on_desktop
def test_a_video_that_breaks_off_is_loaded_again(
    browser: Browser, site: Site, make_seat: MakeSeat, scheme: str, viewport: object
) -> None:
    _, _, link = make_seat()
    with another_browser(browser, site, "Failed to load resource") as page:
        sent: list[int] = []

        def send(route: Route) -> None:
            """Send the left video whole, but the first time without the end of its frames."""
            headers = {**route.request.headers, "range": "bytes=0-"}
            body = route.fetch(headers=headers).body()
            sent.append(len(body))
            if len(sent) == 1:
                start = body.index(b"mdat") + 4  # behind it may be padding, which nobody decodes
                size = int.from_bytes(body[start - 8 : start - 4], "big") - 8
                cut = slice(start + size // 2, start + size)
                body = body[: cut.start] + b"\xff" * (cut.stop - cut.start) + body[cut.stop :]
            route.fulfill(status=200, headers={"Content-Type": "video/mp4"}, body=body)

        page.add_init_script(NOTES)
        page.route("**/left.mp4", send)
        rater = RaterPage(page)
        page.goto(site.url + link)
        page.get_by_role("button", name="Start").click()
        rater.wait_for_pair()
        rater.press("ArrowLeft")
        wait_until(
            lambda: page.evaluate("notes.some((each) => each.includes('videos do not play'))"),
            60,
            "the page says that the videos do not play",
        )
        expect(rater.note()).to_be_empty(timeout=SLOW_MS)
        rater.wait_for_pair()
        assert rater.chosen() == ["left"]
        assert len(sent) > 1


@on_desktop
def test_a_vote_is_taken_back_and_breaks_are_suggested(
    visit: Visit, site: Site, make_seat: MakeSeat, redis: Redis
) -> None:
    comparison, rater_id, link = make_seat(prompts=3, break_every=2)
    rater = RaterPage(visit.page)
    rater.start(link, site)
    page = rater.page
    expect(page.get_by_role("button", name="Undo the last")).to_be_disabled()
    rater.press(*["ArrowRight"] * len(BY_ID), "Enter")
    expect(page.locator("#count")).to_have_text("1 of 3 rated")
    rater.wait_for_pair()
    rater.press("u")
    expect(page.locator("#count")).to_have_text("0 of 3 rated")
    rater.wait_for_pair()
    assert rater.chosen() == ["right"] * len(BY_ID)  # as it was sent
    rater.press("1", "ArrowLeft", "Enter")
    expect(page.locator("#count")).to_have_text("1 of 3 rated")
    assert answers(redis, comparison, rater_id)[0].choices["overall_consistency"] == "left"
    rater.wait_for_pair()
    rater.press("k")
    expect(rater.message).to_contain_text("Time for a break")
    rater.press("Enter")
    rater.wait_for_pair()
    ComparisonStore(redis).change_state(
        comparison.id, ComparisonState.PAUSED, [ComparisonState.RUNNING]
    )
    rater.press("k")
    expect(rater.message).to_contain_text("Paused")
    visit.faults.remove(next(each for each in visit.faults if "409" in each))
    ComparisonStore(redis).change_state(
        comparison.id, ComparisonState.RUNNING, [ComparisonState.PAUSED]
    )
    rater.wait_for_pair()


@on_desktop
def test_keys_can_be_changed(visit: Visit, site: Site, make_seat: MakeSeat) -> None:
    _, _, link = make_seat()
    rater = RaterPage(visit.page)
    rater.start(link, site)
    rater.press("?")
    rater.page.get_by_label("Change the key of: Vote: left is better").click()
    rater.press("a", "Escape")
    rater.press("ArrowLeft", "a")
    assert rater.chosen() == ["left"]
    rater.press("k")
    expect(rater.page.locator("#keys")).to_contain_text("a left")


@on_desktop
def test_who_was_removed_is_told(
    browser: Browser, site: Site, make_seat: MakeSeat, redis: Redis, scheme: str, viewport: object
) -> None:
    comparison, rater_id, link = make_seat()
    with another_browser(browser, site, "401", "403") as page:
        rater = RaterPage(page)
        rater.start(link, site)
        RaterStore(redis).remove(comparison.id, rater_id)
        rater.press("k")
        expect(rater.message).to_contain_text("This link does not open anything", timeout=SLOW_MS)
        page.goto(f"{site.url}/rate#nonsense")
        expect(rater.message).to_contain_text("This link does not open anything")


@on_phone
def test_a_phone_shows_one_video_and_taps_swap(
    visit: Visit, site: Site, make_seat: MakeSeat, redis: Redis
) -> None:
    comparison, rater_id, link = make_seat()
    rater = RaterPage(visit.page)
    rater.start(link, site)
    page = rater.page
    expect(page.locator(".player-front")).to_have_text("Left")
    for question in page.locator(".question").all():
        question.get_by_text("Right", exact=True).click()
    page.get_by_role("button", name="Send vote").click()
    expect(page.locator("#missing")).to_have_text("Look at the right video before you vote.")
    page.locator(".player-stage").click()
    expect(page.locator(".player-front")).to_have_text("Right")
    page.get_by_role("button", name="Send vote").click()
    expect(page.locator("#count")).to_have_text("1 of 2 rated")
    assert len(answers(redis, comparison, rater_id)) == 1
    rater.wait_for_pair()
    expect(page.locator("#prompt")).to_be_in_viewport()  # although the button is far below it


def test_the_pages_are_accessible(
    visit: Visit, site: Site, make_seat: MakeSeat, offer: WorkerOffer, redis: Redis
) -> None:
    comparison, _, link = make_seat()
    page = visit.open("/comparisons")
    catalog.publish(redis, offer)
    page.get_by_role("button", name="New comparison").click()
    expect(page.get_by_label("Reference")).to_have_value("0")
    for summary in page.locator("#create summary").all():
        summary.click()
    _check(page)
    visit.open(f"/comparisons/{comparison.id}")
    expect(page.locator("#pairs tbody tr")).to_have_count(2)
    _check(page)
    visit.open(f"/comparisons/{comparison.id}/report")
    expect(page.locator(".sentence")).to_be_visible(timeout=SLOW_MS)
    _check(page)
    rater = RaterPage(page)
    rater.start(link, site)
    _check(page)


def _check(page: Page) -> None:
    assert_accessible(page)
    assert_reflows(page)
