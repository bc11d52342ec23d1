"""Test what the player does besides keeping its videos together: keys, views, zoom, its record."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from deploy.local.waiting import wait_until
from tests.pages.accessibility import assert_accessible, assert_reflows
from tests.pages.conftest import PHONE
from tests.pages.player.conftest import Pair
from tests.pages.player.test_frame_exactness import unequal


@pytest.fixture(scope="module")
def phone(browser: Browser, player_site: str) -> Iterator[Page]:
    context = browser.new_context(viewport=PHONE, has_touch=True)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{player_site}/pair")
    yield page
    context.close()


def transforms(pair: Pair) -> list[str]:
    return list(pair.call("player.canvases.map((each) => getComputedStyle(each).transform)"))


def open_keys(pair: Pair) -> None:
    pair.page.keyboard.press("?")
    pair.page.get_by_role("dialog", name="Keys").wait_for()


def frame_after(pair: Pair, key: str) -> int:
    pair.page.keyboard.press(key)
    pair.page.wait_for_timeout(400)
    return int(pair.call("player.frame"))


def test_everything_is_done_with_keys(pair: Pair) -> None:
    assert pair.load("short")
    press = pair.page.keyboard.press
    assert frame_after(pair, "End") == 80
    assert frame_after(pair, ",") == 79
    assert frame_after(pair, "Home") == 0
    press("Space")
    assert pair.call("player.playing")
    press("Space")
    assert not pair.call("player.playing")
    for key, view in [
        ("w", "wipe"),
        ("f", "flicker"),
        ("x", "single"),
        ("d", "single"),
        ("s", "side"),
    ]:
        press(key)
        assert pair.call("player.view") == view
    press("[")
    press("[")
    assert pair.call("player.gate.sides.map(({ video }) => video.playbackRate)") == [0.5, 0.5]
    press("]")
    assert pair.call("player.provenance().speed") == 0.5, "the slowest that was used"
    press("l")
    assert not pair.call("player.loop")
    whole = transforms(pair)
    press("+")
    press("Shift+ArrowRight")
    closer = transforms(pair)
    assert closer[0] == closer[1] != whole[0]
    press("0")
    assert transforms(pair) == whole


def test_a_key_is_changed_and_stays_so(pair: Pair) -> None:
    assert pair.load("short")
    open_keys(pair)
    pair.page.get_by_label("Change the key of: One frame on").click()
    pair.page.keyboard.press("w")
    pair.page.get_by_text("w is taken: View: wipe").wait_for()
    pair.page.keyboard.press("n")
    pair.page.keyboard.press("Escape")
    assert frame_after(pair, ".") == 0
    assert frame_after(pair, "n") == 1
    pair.page.reload()
    assert pair.load("short")
    assert frame_after(pair, "n") == 1
    open_keys(pair)
    pair.page.get_by_role("button", name="All as they were").click()
    pair.page.get_by_role("button", name="Close").click()
    assert frame_after(pair, ".") == 2


def test_a_key_is_switched_off(pair: Pair) -> None:
    assert pair.load("short")
    open_keys(pair)
    pair.page.get_by_label("Switch off the key of: View: wipe").click()
    pair.page.get_by_role("button", name="Close").click()
    pair.page.keyboard.press("w")
    assert pair.call("player.view") == "side"


def test_keys_of_a_control_stay_its_own(pair: Pair) -> None:
    assert pair.load("short")
    pair.page.get_by_label("Frame", exact=True).focus()
    pair.page.keyboard.press("End")
    wait_until(lambda: pair.call("player.frame") == 80)
    pair.page.get_by_role("button", name="Loop").focus()
    pair.page.keyboard.press("Space")
    assert not pair.call("player.loop")
    assert not pair.call("player.playing")


def test_flicker_changes_sides_at_most_three_times_a_second(pair: Pair) -> None:
    assert pair.load("short")
    times = pair.call("""new Promise((resolve) => {
      const times = [];
      new MutationObserver(() => times.push(performance.now()))
        .observe(player.root, { attributes: true, attributeFilter: ["data-front"] });
      player.setView("flicker");
      setTimeout(() => resolve(times), 3000);
    })""")
    assert 5 <= len(times) <= 10
    assert (times[-1] - times[0]) / (len(times) - 1) > 1000 / 3
    pair.call("player.setView('side')")


def test_the_difference_waits_until_it_is_allowed(pair: Pair) -> None:
    assert pair.load("short")
    choice = pair.page.get_by_label("View", exact=True)
    assert choice.locator("option[value=difference]").is_disabled()
    pair.call("player.setView('difference')")
    assert pair.call("player.view") == "side"
    pair.call("player.allowDifference = true")
    choice.select_option("difference")
    blend = "getComputedStyle(player.sides[1]).mixBlendMode"
    assert pair.call(blend) == "difference"
    pair.call("player.allowDifference = false")
    assert pair.call("player.view") == "side"
    assert pair.call(blend) == "normal"


def test_the_wipe_follows_its_slider(pair: Pair) -> None:
    assert pair.load("short")
    pair.page.keyboard.press("w")
    pair.page.get_by_label("Wipe", exact=True).fill("25")
    clip = pair.call("getComputedStyle(player.sides[1]).clipPath")
    assert clip == "inset(0px 0px 0px 25%)"


def test_wheel_and_drag_move_both_pictures(pair: Pair) -> None:
    assert pair.load("short")
    box = pair.page.locator(".player-side").first.bounding_box()
    assert box is not None
    corner = (box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    mouse = pair.page.mouse
    mouse.move(*corner)
    mouse.wheel(0, -400)
    wait_until(lambda: pair.call("player.zoom.scale") > 2)
    before = transforms(pair)
    assert before[0] == before[1]
    mouse.down()
    mouse.move(corner[0] - 40, corner[1] - 20)
    mouse.up()
    after = transforms(pair)
    assert after[0] == after[1] != before[0]
    assert not pair.call("player.playing"), "a drag is no tap"
    mouse.down()
    mouse.up()
    assert pair.call("player.playing")


def test_nobody_who_wants_stillness_gets_autoplay(pair: Pair) -> None:
    pair.page.emulate_media(reduced_motion="reduce")
    assert pair.load("short", autoplay=True)
    assert not pair.call("player.playing")
    pair.page.reload()
    pair.page.emulate_media(reduced_motion="no-preference")
    assert pair.load("short", autoplay=True)
    assert pair.call("player.playing")


def test_only_what_was_seen_is_on_record(pair: Pair) -> None:
    assert pair.load("short")
    pair.call("player.setView('single')")
    for _ in range(4):
        pair.call("player.step(1)")
    pair.call("player.swap()")
    pair.call("player.step(1)")
    seen = pair.call("player.provenance()")
    # The left one had frame 0 beside the other; then 1 to 4 alone; the right one has 4 and 5.
    assert seen["frames_seen"] == [5, 3]
    assert (seen["seconds_watched"], seen["replays"], seen["dropped_frames"]) == (0, 0, 0)
    assert seen["viewport"] == [1280, 900]
    pair.call("player.setView('side')")
    pair.call("player.play()")
    wait_until(lambda: pair.call("player.frame") > 40, every_s=0.2)
    pair.call("player.pause()")
    assert 1.5 < pair.call("player.provenance()")["seconds_watched"] < 15


def test_a_side_waits_for_one_that_stalls(pair: Pair) -> None:
    assert pair.load("short")
    pair.call("player.play()")
    wait_until(lambda: pair.call("player.frame") > 8, every_s=0.2)
    pair.call("player.gate.sides[1].video.pause()")
    wait_until(lambda: pair.call("player.gate.sides[0].held"))
    ahead = "player.gate.sides[0].newest - player.gate.sides[1].newest"
    pair.page.wait_for_timeout(500)
    assert 3 <= pair.call(ahead) <= 6
    stopped_at = pair.call("player.frame")
    pair.call("player.gate.sides[1].video.play()")
    wait_until(lambda: pair.call("player.frame") > stopped_at + 10, every_s=0.2)
    assert unequal(pair.painted()) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_player_is_accessible(pair: Pair, scheme: str) -> None:
    pair.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    assert pair.load("short")
    for view in ("side", "wipe", "single"):
        pair.call(f"player.setView('{view}')")
        assert_accessible(pair.page)
        assert_reflows(pair.page)
    small = pair.page.evaluate("""[...document.querySelectorAll(".player button, .player select")]
      .map((each) => each.getBoundingClientRect())
      .filter(({ width, height }) => width < 24 || height < 24).length""")
    assert small == 0, "targets have 24 px or more (WCAG 2.5.8)"
    open_keys(pair)
    assert_accessible(pair.page)
    assert_reflows(pair.page)


def test_a_phone_shows_one_at_a_time_and_a_tap_swaps(phone: Page) -> None:
    pair = Pair(phone)
    assert pair.load("short")
    assert pair.call("player.view") == "single"
    assert pair.call("player.root.dataset.front") == "left"
    phone.locator(".player-stage").tap()
    wait_until(lambda: pair.call("player.root.dataset.front") == "right")
    assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_two_fingers_zoom(phone: Page) -> None:
    pair = Pair(phone)
    phone.reload()
    assert pair.load("short")
    box = phone.locator(".player-stage").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touches = phone.context.new_cdp_session(phone)
    for kind, apart in [("touchStart", 30), ("touchMove", 60), ("touchMove", 90), ("touchEnd", 0)]:
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        sent = {"type": kind, "touchPoints": points if apart else []}
        touches.send("Input.dispatchTouchEvent", sent)
    assert 2.5 < pair.call("player.zoom.scale") < 3.5
    assert pair.call("player.root.dataset.front") == "left", "a pinch is no tap"


def test_a_video_that_cannot_be_had_is_told(phone: Page) -> None:
    pair = Pair(phone)
    phone.reload()
    assert not pair.load("missing")
    assert pair.call("window.events.at(-1)") == {
        "type": "error",
        "message": "A video cannot be loaded or played.",
    }
