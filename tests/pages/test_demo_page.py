"""Test the page that makes videos, and the page of a job, in a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect
from redis import Redis

from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until
from jobs.artifacts.known_store import open_known_artifacts
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from service.auth.api_keys import KeyStore, Role
from service.settings import ServiceSettings
from tests.pages.conftest import DESKTOP, PHONE, Visit
from tests.pages.played_worker import PlayedWorker, make_files
from tests.support.http_service import Site, serving
from tests.support.requests import generation_request

LIMIT_MS = 20_000
expect.set_options(timeout=LIMIT_MS)


# One variant of each test, unless it says otherwise: they wait for workers.
@pytest.fixture
def scheme() -> str:
    return "light"


@pytest.fixture
def viewport(request: pytest.FixtureRequest) -> dict[str, int]:
    return PHONE if getattr(request, "param", "desktop") == "phone" else DESKTOP


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def worker(
    redis: Redis, settings: ServiceSettings, files: tuple[Path, Path]
) -> Iterator[PlayedWorker]:
    artifacts = open_known_artifacts(settings.artifacts_url, redis)
    artifacts.probe()
    with PlayedWorker(redis, artifacts, files) as worker:
        yield worker


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()


def card(page: Page, index: int = 0) -> Locator:
    return page.locator("#cards .job-card").nth(index)


def line(page: Page, index: int = 0) -> Locator:
    return card(page, index).locator(".job-line")


def plays(video: Locator) -> None:
    """Wait until the video is at another place than before, and shows more than one colour."""
    expect(video).to_be_visible()
    was = video.evaluate("video => video.currentTime")
    wait_until(
        lambda: video.evaluate("video => video.currentTime") not in (0, was),
        20,
        "the video plays",
        every_s=0.05,
    )
    colours = video.evaluate(
        """video => {
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
          const context = canvas.getContext("2d");
          context.drawImage(video, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    assert colours > 10, "the frame is blank"


def forgive(visit: Visit, *texts: str) -> None:
    """Take out the faults that a test has caused; the browser logs each refused request."""
    caused = [fault for fault in visit.faults if any(text in fault for text in texts)]
    assert caused, f"no {texts} among {visit.faults}"
    visit.faults = [fault for fault in visit.faults if fault not in caused]


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a process within the block; it is killed at the end, as it may load a model for long."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def fits(page: Page) -> None:
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wider <= 0, f"the page is {wider} px wider than the screen"


@pytest.mark.parametrize("viewport", ["desktop", "phone"], indirect=True)
def test_a_newcomer_sees_a_video(visit: Visit, worker: PlayedWorker) -> None:
    page = visit.open("/")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red square moving right")
    page.get_by_role("button", name="a blue square moving right").click()
    generate(page)
    expect(line(page)).to_contain_text("Next in line")
    job_id = worker.take()
    assert worker.store.get(job_id).request.prompt == "a blue square moving right"
    worker.step(job_id, 3, seconds_left=12)
    expect(line(page)).to_contain_text("Denoising, step 3 of 8 · about 1")
    box = card(page).locator(".screen").bounding_box()
    bar = card(page).get_by_role("progressbar")
    assert bar.evaluate("bar => bar.value") == pytest.approx(3 / 8)
    worker.step(job_id, 7, seconds_left=2)
    expect(line(page)).to_contain_text("step 7 of 8")
    assert card(page).locator(".screen").bounding_box() == box, "the layout moved"
    worker.succeed(job_id)
    plays(card(page).locator("video"))
    assert card(page).locator(".screen").bounding_box() == box, "the layout moved"
    fits(page)
    tile = page.locator("#gallery-list li").first
    expect(tile.locator("img")).to_be_visible()
    assert tile.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 96
    tile.get_by_role("link").click()
    expect(page.locator("#facts")).to_contain_text("blue square")
    job = worker.store.get(job_id)
    assert job.video is not None
    expect(page.locator("#facts")).to_contain_text(job.video.sha256)
    expect(page.locator("#facts")).to_contain_text(str(job.request.seed))
    expect(page.locator("#curl")).to_contain_text(f'"seed":{job.request.seed}')
    plays(card(page).locator("video"))
    fits(page)


def test_the_miniature_makes_all_its_modes_side_by_side(
    visit: Visit, redis_url: str, settings: ServiceSettings, tmp_path: Path
) -> None:
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": settings.artifacts_url,
        "WORKER_DEVICE": "cpu",
        "WORKER_THREADS": "2",
    }
    command = [sys.executable, "-m", "worker", "--config", str(ROOT / "deploy/wan-mini.toml")]
    page = visit.open("/")
    expect(page.get_by_text("No worker is ready")).to_be_visible()
    with running(command, tmp_path / "worker.log", environment):
        expect(page.get_by_text("No worker is ready")).to_be_hidden(timeout=240_000)
        page.get_by_label("All 4, side by side").check()
        page.locator("#advanced summary").click()
        page.get_by_label("Frames").select_option("5")
        page.get_by_label("Steps", exact=True).fill("4")
        page.get_by_label("Guidance", exact=True).fill("1")
        generate(page)
        modes = ["bf16", "fast", "fast-w8a8", "w8a8"]  # sorted
        expect(page.locator(".cards video")).to_have_count(4, timeout=240_000)
        for index, mode in enumerate(modes):
            expect(card(page, index).locator(".tag")).to_have_text(mode)
            plays(card(page, index).locator("video"))
    jobs = JobStore(Redis.from_url(redis_url)).list().jobs
    assert len({job.request.seed for job in jobs}) == 1
    assert {job.request.mode for job in jobs} == set(modes)


def tab_to(page: Page, what: str, text: str) -> None:
    """Press Tab until `what` of the element with the focus is the text."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(f"document.activeElement.{what}") == text:
            return
    raise AssertionError(f"Tab does not lead to {text}")


def test_a_job_is_cancelled_by_keyboard_alone(visit: Visit, worker: PlayedWorker) -> None:
    page = visit.open("/")
    page.locator("#examples button").first.wait_for()
    tab_to(page, "id", "prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("a red square, typed")
    tab_to(page, "id", "generate")
    page.keyboard.press("Enter")
    job_id = worker.take()
    assert worker.store.get(job_id).request.prompt == "a red square, typed"
    worker.step(job_id, 1)
    expect(line(page)).to_contain_text("step 1 of 8")
    tab_to(page, "textContent", "Cancel")
    page.keyboard.press("Enter")
    expect(line(page)).to_have_text("Stopping after this step…")
    wait_until(lambda: worker.is_asked_to_stop(job_id), 10, "the worker is told")
    worker.stop(job_id)
    expect(line(page)).to_have_text("Cancelled")
    kept = card(page).evaluate("card => card.contains(document.activeElement)")
    assert kept, "the focus stays in the card"
    expect(card(page).get_by_role("link", name="Again with this seed")).to_be_visible()


def test_a_reload_goes_on_with_both_jobs_and_one_stream(
    visit: Visit, site: Site, worker: PlayedWorker
) -> None:
    page = visit.open("/")
    page.get_by_label("Both, side by side").check()
    generate(page)
    first = worker.take("bf16")
    worker.step(first, 2)
    expect(line(page)).to_contain_text("step 2 of 8")
    expect(line(page, 1)).to_contain_text("Waiting: 1 job before it")
    page.reload()
    expect(line(page)).to_contain_text("step 2 of 8")
    expect(line(page, 1)).to_contain_text("Waiting: 1 job before it")
    wait_until(lambda: site.hub.followers == 1, 10, "one stream is open")
    worker.succeed(first)
    second = worker.take("w8a8")
    worker.step(second, 5)
    expect(line(page, 1)).to_contain_text("step 5 of 8")
    worker.succeed(second)
    for index in range(2):
        plays(card(page, index).locator("video"))
    page.get_by_role("button", name="Play together from the start").click()
    page.goto("about:blank")
    wait_until(lambda: site.hub.followers == 0, 10, "the stream is closed")


def test_a_restart_of_the_service_goes_unnoticed_by_jobs(
    browser: Any, settings: ServiceSettings, worker: PlayedWorker, unused_port: int, scheme: str
) -> None:
    settings = settings.model_copy(update={"public_url": None})
    context = browser.new_context(color_scheme=scheme, viewport=DESKTOP)
    page = context.new_page()
    with serving(settings, unused_port) as site:
        page.goto(site.url)
        generate(page)
        job_id = worker.take()
        worker.step(job_id, 1)
        expect(line(page)).to_contain_text("step 1 of 8")
    expect(page.locator("#connection")).to_contain_text("The service does not answer")
    worker.step(job_id, 6)
    with serving(settings, unused_port):
        expect(line(page)).to_contain_text("step 6 of 8", timeout=40_000)
        expect(page.locator("#connection")).to_be_hidden()
        worker.succeed(job_id)
        plays(card(page).locator("video"))
        context.close()


def test_a_revoked_session_asks_for_the_key_and_goes_on(
    visit: Visit, redis: Redis, worker: PlayedWorker
) -> None:
    keys = KeyStore(redis)
    _, token = keys.add("alice", Role.USER)
    page = visit.open("/")

    def sign_in(key: str) -> None:
        page.get_by_label("API key").fill(key)
        page.locator("#sign-in").get_by_role("button", name="Sign in").click()

    sign_in("wan_wrong")
    expect(page.locator("#sign-in .problem")).to_contain_text("does not open the service")
    sign_in(token)
    expect(page.locator("#who")).to_contain_text("alice")
    generate(page)
    job_id = worker.take()
    worker.step(job_id, 1)
    expect(line(page)).to_contain_text("step 1 of 8")
    _, token = keys.rotate("alice")
    expect(page.locator("#sign-in")).to_be_visible()
    worker.step(job_id, 4)
    sign_in(token)
    expect(page.locator("#sign-in")).to_be_hidden()
    expect(line(page)).to_contain_text("step 4 of 8")
    worker.succeed(job_id)
    plays(card(page).locator("video"))
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("#sign-in")).to_be_visible()
    assert worker.store.get(job_id).owner == "alice"
    page.goto("about:blank")  # it asks for no more
    forgive(visit, "401")


def test_refusals_stand_next_to_their_fields(visit: Visit, worker: PlayedWorker) -> None:
    page = visit.open("/")
    page.locator("#advanced summary").click()
    page.get_by_label("Steps", exact=True).fill("5000")
    page.get_by_label("Fixed", exact=True).check()
    page.get_by_label("Fixed seed").fill("-3")
    page.locator("#advanced summary").click()
    page.get_by_label("Prompt", exact=True).fill("a" * 101)
    generate(page)
    for field, text in [("prompt", "101"), ("num_inference_steps", "5000"), ("seed", "-3")]:
        expect(page.locator(f'[data-field="{field}"] .field-error')).to_contain_text(text)
    expect(page.get_by_label("Steps", exact=True)).to_be_visible()  # the section opened
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.get_by_label("Prompt", exact=True).fill("a cat and a red square moving right")
    expect(page.locator("#prompt-words")).to_contain_text("cat")
    expect(page.locator("#prompt-words")).not_to_contain_text("square,")
    page.get_by_label("Steps", exact=True).fill("8")
    page.get_by_label("Fixed seed").fill("9223372036854775807")
    generate(page)
    job_id = worker.take()  # words that are unknown are no reason to refuse
    assert worker.store.get(job_id).request.seed == 2**63 - 1
    expect(page.locator(".field-error")).to_have_count(0)
    forgive(visit, "422")


def test_a_full_quota_is_told_with_what_to_do(
    visit: Visit, redis: Redis, worker: PlayedWorker
) -> None:
    _, token = KeyStore(redis).add("alice", Role.USER, quota=1)
    page = visit.open("/")
    page.get_by_label("API key").fill(token)
    page.keyboard.press("Enter")
    page.get_by_label("Both, side by side").check()
    generate(page)
    expect(page.locator("#refusal")).to_contain_text("Try again in")
    expect(page.locator("#cards .job-card")).to_have_count(1)  # the first of the two was accepted
    worker.fail(worker.take(), "worker_lost", "Two workers were lost.")
    expect(card(page).locator(".problem")).to_contain_text("The workers that ran it")
    expect(card(page).locator(".problem")).to_contain_text("Generate it again")
    forgive(visit, "401", "429")


def test_the_twin_is_found_and_made(visit: Visit, worker: PlayedWorker) -> None:
    page = visit.open("/")
    page.get_by_label("bf16", exact=True).check()
    generate(page)
    first = worker.take()
    worker.succeed(first)
    page.get_by_role("button", name="The same in w8a8").click()
    second = worker.take()
    worker.succeed(second)
    plays(card(page, 1).locator("video"))
    made, twin = worker.store.get(first).request, worker.store.get(second).request
    assert made == twin.model_copy(update={"mode": "bf16"})
    assert twin.mode == "w8a8"
    page = visit.open(f"/jobs/{first}")
    page.get_by_role("button", name="Next to its twin in w8a8").click()
    plays(card(page, 1).locator("video"))
    page.get_by_role("link", name="Again with this seed").first.click()
    expect(page.get_by_label("bf16", exact=True)).to_be_checked()
    expect(page.locator("#settings")).to_contain_text(f"seed {made.seed}")


def test_links_are_copied_without_the_clipboard_of_secure_pages(
    visit: Visit, worker: PlayedWorker, store: JobStore
) -> None:
    job = store.create(_request(), worker.offer.queue).job
    worker.succeed(worker.take())
    visit.page.add_init_script("delete Navigator.prototype.clipboard")
    page = visit.open(f"/jobs/{job.id}")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    page.evaluate(
        "() => { const area = document.createElement('textarea'); area.id = 'paste';"
        " document.body.append(area); area.focus(); }"
    )
    page.keyboard.press("Control+V")
    copied = page.locator("#paste").input_value()
    assert copied.startswith(f"{visit.url}/jobs/{job.id}/video.mp4?")
    assert page.request.get(copied).ok


def test_a_store_that_is_away_is_told_and_waited_for(
    visit: Visit, worker: PlayedWorker, store: JobStore, tmp_path: Path
) -> None:
    job = store.create(_request(), worker.offer.queue).job
    worker.succeed(worker.take())
    away = (tmp_path / "artifacts").rename(tmp_path / "away")
    page = visit.open(f"/jobs/{job.id}")
    expect(card(page).locator(".screen")).to_contain_text("tries again by itself")
    away.rename(tmp_path / "artifacts")
    plays(card(page).locator("video"))
    forgive(visit, "503")


def test_a_preview_takes_the_place_of_the_video(
    visit: Visit, worker: PlayedWorker, files: tuple[Path, Path]
) -> None:
    def with_preview(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        if body["state"] == "running":
            body["preview_url"] = f"{visit.url}/jobs/{body['id']}/preview.webp?number=2"
        route.fulfill(response=answer, json=body)

    picture = files[1]
    visit.page.route("**/preview.webp?number=2", lambda route: route.fulfill(path=picture))
    page = visit.open("/")
    generate(page)
    job_id = worker.take()
    worker.step(job_id, 1)
    expect(line(page)).to_contain_text("step 1 of 8")
    box = card(page).locator(".screen").bounding_box()
    page.route(f"**/jobs/{job_id}", with_preview)
    page.reload()
    expect(card(page).get_by_alt_text("Preview")).to_be_visible()
    assert card(page).locator(".screen").bounding_box() == box
    worker.succeed(job_id)
    plays(card(page).locator("video"))


def test_the_gallery_pages_and_filters(visit: Visit, worker: PlayedWorker, store: JobStore) -> None:
    for number in range(26):
        mode = "bf16" if number % 2 else "w8a8"
        store.create(_request(prompt=f"square {number}", mode=mode), worker.offer.queue)
    store.create(_request(), worker.offer.queue, Submission(owner="somebody else"))
    page = visit.open("/")
    tiles = page.locator("#gallery-list li")
    expect(tiles).to_have_count(24)
    expect(tiles.first).to_contain_text("square 25")
    page.get_by_role("button", name="Show more").click()
    expect(tiles).to_have_count(26)
    page.get_by_label("Show only the mode").select_option("bf16")
    expect(tiles).to_have_count(13)
    page.get_by_label("Show only the state").select_option("failed")
    expect(page.locator("#gallery-empty")).to_be_visible()
    page.set_viewport_size({"width": 320, "height": PHONE["height"]})
    fits(page)
    assert store.list(JobState.QUEUED).jobs


def test_an_unknown_job_is_said_to_be_unknown(visit: Visit) -> None:
    page = visit.open("/jobs/01a2039b8ee84d074d36452736a1b6c7")
    expect(card(page).locator(".screen")).to_have_text("There is no such job")
    forgive(visit, "404")


def _request(**changes: object) -> Any:
    values = {"model": "drawing", "size": "96x64", "num_inference_steps": 8} | changes
    return generation_request(**values)
