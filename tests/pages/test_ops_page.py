"""Test the page for operators in a real browser: what it shows, orders, makes, and outlives."""

import re
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest
from playwright.sync_api import Page, expect
from redis import Redis

from jobs import redis_keys
from jobs.catalog import WorkerOffer
from jobs.record import Attempt, Failure, Progress, Stage
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore, new_token
from jobs.store.submission import Submission
from jobs.store.workers import WorkerStatus, publish_status, read_orders
from service.auth.api_keys import KeyStore, Role, proves, split
from service.middleware.credentials import COOKIE
from tests.pages.conftest import Visit, two_looks
from worker.job.lease import LeaseKeeper
from worker.process.redis_retry import RedisOutage

MINUTE_MS = 60_000


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def key_store(redis: Redis) -> KeyStore:
    return KeyStore(redis)


def sign_in(visit: Visit, keys: KeyStore, role: Role) -> None:
    """Give the browser the session of a new key, as the dialog would."""
    _, token = keys.add("boss", role)
    answer = httpx2.post(f"{visit.url}/session", json={"key": token})
    session = answer.cookies[COOKIE]
    visit.page.context.add_cookies([{"name": COOKIE, "value": session, "url": visit.url}])


def forgive_failed_requests(visit: Visit) -> None:
    """Chromium reports every answer from 400 on as an error, also those that a test is about."""
    visit.faults[:] = [each for each in visit.faults if "Failed to load resource" not in each]


def publish(redis: Redis, status: WorkerStatus) -> None:
    """Publish a status that lives, like the worker's offer, as long as the test takes."""
    publish_status(redis, status)
    redis.persist(redis_keys.worker_status(status.worker_id))
    redis.persist(redis_keys.worker_offer(status.worker_id))


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@two_looks
def test_operators_see_the_fleet_and_its_jobs(
    opened: ExitStack,
    visit: Visit,
    redis: Redis,
    store: JobStore,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    def claimed(owner: str) -> Attempt:
        job = store.create(request_for_video, live_worker.queue, Submission(owner=owner)).job
        redis.lrem(f"rq:queue:{live_worker.queue}", 1, job.id)  # as a worker takes it
        return store.claim(job.id, live_worker.worker_id, new_token())

    store.fail(claimed("carol"), Failure(code="worker_lost", detail="Two workers were lost."))
    running = claimed("alice")
    opened.enter_context(LeaseKeeper(store, running, RedisOutage()))
    store.progress(running, Progress(stage=Stage.DENOISE, step=4, steps=20, seconds_left=75))
    waiting = store.create(request_for_video, live_worker.queue, Submission(owner="bob")).job
    status = WorkerStatus(
        worker_id=live_worker.worker_id,
        state="busy",
        job_id=running.job_id,
        memory_allocated_bytes=60 * 10**9,
        memory_peak_bytes=70 * 10**9,
        memory_total_bytes=150 * 10**9,
    )
    publish(redis, status)
    page = visit.open("/ops")
    workers = page.locator("#workers")
    workers.get_by_text("denoising 4/20 · 1 min 15 s left").wait_for(timeout=MINUTE_MS)
    assert workers.locator("progress").get_attribute("value") == "4"
    expect(workers).to_contain_text("busy")
    expect(workers).to_contain_text("w8a8: This card has no FP8 tensor cores.")
    expect(workers).to_contain_text("60.0 GB of 150.0 GB, peak 70.0 GB")
    tiles = page.locator("#summary strong")
    assert tiles.all_inner_texts() == ["1", "1", "1", "1"]
    expect(page.locator("#queues")).to_contain_text("96x96, 17 frames")
    failures = page.locator("#failures")
    expect(failures).to_contain_text("Two workers were lost.")
    assert re.search(r"jobs/[0-9a-f]{32}$", failures.locator("a").get_attribute("href") or "")
    expect(page.locator("#series-text")).to_contain_text("0 succeeded, 1 failed, 0 cancelled")
    assert page.locator(".uplot canvas").count() == 2
    assert fits(page)
    # One waiting job is cancelled by the keyboard, after the page has asked.
    page.locator("#waiting summary").click()
    cancel = page.locator("#waiting").get_by_role("button", name=f"Cancel job {waiting.id[-8:]}")
    cancel.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#queues")).to_contain_text("Nothing waits.", timeout=MINUTE_MS)
    assert store.get(waiting.id).state is JobState.CANCELLED
    assert store.get(running.job_id).cancel_requested is False


@two_looks
def test_a_worker_is_drained_and_resumed(
    visit: Visit, redis: Redis, live_worker: WorkerOffer
) -> None:
    name = live_worker.worker_id
    publish(redis, WorkerStatus(worker_id=name, state="busy"))
    page = visit.open("/ops")
    page.get_by_role("button", name=f"drain {name}").click(timeout=MINUTE_MS)
    resume = page.get_by_role("button", name=f"resume {name}")
    resume.wait_for(timeout=MINUTE_MS)
    expect(page.locator("#workers")).to_contain_text("draining")
    assert read_orders(redis, [name])[name].by == "local"
    redis.delete(redis_keys.worker_offer(name))
    publish(redis, WorkerStatus(worker_id=name, state="drained", withheld=live_worker))
    expect(page.locator("#workers .tag").first).to_have_text("drained", timeout=MINUTE_MS)
    resume.focus()
    page.wait_for_timeout(4000)  # the page has asked again meanwhile
    expect(resume).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("button", name=f"drain {name}").wait_for(timeout=MINUTE_MS)
    assert read_orders(redis, [name]) == {}


@two_looks
def test_keys_are_made_changed_rotated_and_revoked(visit: Visit, key_store: KeyStore) -> None:
    sign_in(visit, key_store, Role.OPS)
    page = visit.open("/ops")
    keys = page.locator("#keys")
    keys.get_by_text("yours").wait_for(timeout=MINUTE_MS)
    assert keys.get_by_role("button", name="Revoke boss").count() == 0, "it is in use"

    def secret() -> str:
        shown = page.locator("#secret")
        shown.wait_for(timeout=MINUTE_MS)
        page.keyboard.press("Escape")  # it stays, because it is shown only once
        parts = split(shown.input_value())
        assert parts is not None
        page.get_by_role("button", name="I have stored it").click()
        expect(shown).to_have_count(0)
        assert parts[1] not in page.content()
        return parts[1]

    page.get_by_role("button", name="Make a key").click()
    page.get_by_label("Name", exact=True).fill("ci")
    page.get_by_label("Rate", exact=True).fill("often")
    page.get_by_role("button", name="Make the key").click()
    page.get_by_text("'often' is not a rate").first.wait_for(timeout=MINUTE_MS)
    forgive_failed_requests(visit)
    page.get_by_label("Rate", exact=True).fill("9/second")
    page.get_by_role("button", name="Make the key").click()
    first = secret()
    _, ci = key_store.all()
    assert (ci.name, ci.role, ci.rate) == ("ci", Role.USER, "9/second")
    assert proves(first, ci)

    page.get_by_role("button", name="Change ci").click()
    page.get_by_label("Quota", exact=True).fill("7")
    page.get_by_label("Role", exact=True).select_option("ops")
    page.get_by_role("button", name="Change the key").click()
    expect(page.locator("dialog[open]")).to_have_count(0, timeout=MINUTE_MS)
    ci = key_store.all()[1]
    assert (ci.quota, ci.role, ci.rate) == (7, Role.OPS, "9/second")

    page.get_by_role("button", name="Rotate ci").click()
    page.get_by_role("button", name="Rotate the key").click()
    second = secret()
    assert not proves(first, key_store.get(ci.id))
    assert proves(second, key_store.get(ci.id))

    page.get_by_role("button", name="Revoke ci").click()
    page.get_by_role("button", name="Revoke the key").click()
    keys.get_by_text("Revoked (1)").wait_for(timeout=MINUTE_MS)
    ci = key_store.all()[1]
    assert ci.revoked_at is not None
    assert fits(page)


@two_looks
def test_the_page_says_that_the_service_is_away_and_recovers(
    visit: Visit, redis: Redis, live_worker: WorkerOffer
) -> None:
    publish(redis, WorkerStatus(worker_id=live_worker.worker_id, state="idle"))
    page = visit.open("/ops")
    page.locator("#workers .tag").first.wait_for(timeout=MINUTE_MS)
    page.context.set_offline(True)
    page.locator("#connection").wait_for(timeout=MINUTE_MS)
    expect(page.locator("#connection")).to_contain_text("The service does not answer")
    expect(page.locator("#workers")).to_contain_text("idle")  # what was known stays
    publish(redis, WorkerStatus(worker_id=live_worker.worker_id, state="busy"))
    page.context.set_offline(False)
    expect(page.locator("#workers .tag").first).to_have_text("busy", timeout=MINUTE_MS)
    expect(page.locator("#connection")).to_be_hidden()
    forgive_failed_requests(visit)


@two_looks
def test_others_are_told_that_it_is_not_for_them(visit: Visit, key_store: KeyStore) -> None:
    sign_in(visit, key_store, Role.USER)
    page = visit.open("/ops")
    page.get_by_text("This is for keys of the role ops").wait_for(timeout=MINUTE_MS)
    assert page.locator("#operations").is_hidden()
    forgive_failed_requests(visit)
