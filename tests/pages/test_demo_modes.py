"""Test that the form of the first page follows the bounds and defaults of its mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from redis import Redis

from deploy.local.waiting import wait_until
from jobs.artifacts.known_store import open_known_artifacts
from jobs.catalog import ModeOffer
from jobs.spec import GenerationRequest
from service.settings import ServiceSettings
from tests.pages.conftest import DESKTOP, Visit
from tests.pages.drawing_worker import DrawingEngine
from tests.pages.played_worker import PlayedWorker, make_files

FAST = ModeOffer(
    name="fast",
    description="Four steps without guidance.",
    max_steps=6,
    default_steps=4,
    max_guidance_scale=1.0,
    default_guidance_scale=1.0,
)


@pytest.fixture
def scheme() -> str:
    return "light"


@pytest.fixture
def viewport() -> dict[str, int]:
    return DESKTOP


@pytest.fixture
def worker(redis: Redis, settings: ServiceSettings, tmp_path: Path) -> Iterator[PlayedWorker]:
    """A worker with a guided mode and one of few steps."""
    artifacts = open_known_artifacts(settings.artifacts_url, redis)
    artifacts.probe()
    modes = (DrawingEngine.modes[1], FAST)
    with PlayedWorker(redis, artifacts, make_files(tmp_path), modes) as worker:
        yield worker


def has(page: Page, steps: str, guidance: str, most_steps: str) -> None:
    for name, value in (("Steps", steps), ("Guidance", guidance)):
        expect(page.get_by_label(name, exact=True)).to_have_value(value)
    expect(page.get_by_label("Steps", exact=True)).to_have_attribute("max", most_steps)


def asked(worker: PlayedWorker, count: int) -> dict[str, GenerationRequest]:
    """Wait for so many jobs, and return the newest request of each mode."""
    wait_until(lambda: len(worker.store.list().jobs) == count, 30, f"there are {count} jobs")
    newest_last = reversed(worker.store.list().jobs)
    return {job.request.mode: job.request for job in newest_last}


def test_the_form_follows_the_mode(visit: Visit, worker: PlayedWorker) -> None:
    page = visit.open("/")
    page.locator("#advanced summary").click()
    steps, negative = page.get_by_label("Steps", exact=True), page.get_by_label("Negative prompt")
    has(page, "8", "4", "1000")
    page.get_by_label("fast", exact=True).check()
    has(page, "4", "1", "6")
    expect(page.get_by_label("Guidance", exact=True)).to_have_attribute("readonly", "")
    expect(negative).to_be_disabled()
    expect(page.locator("#settings")).to_contain_text("4 steps, guidance 1")

    # Side by side, what differs is each mode's own; what was typed stays where the modes take it.
    page.get_by_label("Both, side by side").check()
    has(page, "", "", "6")
    expect(negative).to_be_enabled()
    expect(page.locator("#settings")).to_contain_text("each mode's own steps")
    page.get_by_role("button", name="Generate", exact=True).click()
    made = asked(worker, 2)
    told = {
        mode: (each.num_inference_steps, each.guidance_scale, each.negative_prompt)
        for mode, each in made.items()
    }
    assert told == {"w8a8": (8, 4.0, "blurry"), "fast": (4, 1.0, "")}
    assert len({each.seed for each in made.values()}) == 1

    # Nothing is made at all of what only one of the modes would take.
    steps.fill("7")
    page.get_by_role("button", name="Generate", exact=True).click()
    refused = page.locator('[data-field="num_inference_steps"] .field-error')
    expect(refused).to_contain_text("This is 7, which not all of these modes take, but 1 to 6")
    assert len(worker.store.list().jobs) == 2
    page.get_by_label("w8a8", exact=True).check()
    has(page, "7", "4", "1000")
    page.get_by_label("fast", exact=True).check()
    has(page, "4", "1", "6")


def test_the_same_video_in_another_mode_has_that_modes_defaults(
    visit: Visit, worker: PlayedWorker
) -> None:
    page = visit.open("/")
    page.get_by_label("fast", exact=True).check()
    page.get_by_role("button", name="Generate", exact=True).click()
    worker.succeed(worker.take("fast"))
    page.get_by_role("button", name="The same in w8a8").click()
    request = asked(worker, 2)["w8a8"]
    assert (request.num_inference_steps, request.guidance_scale) == (8, 4.0)
    assert request.negative_prompt == "blurry"

    # A form that is filled from a video without guidance has the model's negative prompt again.
    fast = next(job for job in worker.store.list().jobs if job.request.mode == "fast")
    page = visit.open(f"/?from={fast.id}")
    expect(page.get_by_label("Guidance", exact=True)).to_have_value("1")
    page.get_by_label("w8a8", exact=True).check()
    expect(page.get_by_label("Negative prompt")).to_have_value("blurry")
