"""Test that the player never shows two frames of different numbers, whatever is done with it."""

import random
from itertools import pairwise

import pytest

from deploy.local.waiting import wait_until
from tests.pages.player.conftest import Pair
from tests.pages.player.numbered_video import FRAMES

KINDS = ["short", "usual"]


def unequal(painted: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [each for each in painted if len(set(each)) != 1]


@pytest.mark.parametrize(("kind", "steps"), [("short", 200), ("usual", 60)])
def test_steps(pair: Pair, kind: str, steps: int) -> None:
    assert pair.load(kind)
    here, expected = 0, [0]
    for step in ([1] * 80 + [-1] * 60 + [1, -1] * 30)[-steps:]:
        pair.call(f"player.step({step})")
        here += step
        expected.append(here)
    painted = pair.painted()
    assert unequal(painted) == []
    assert [number for number, _, _ in painted] == expected


STALE = """() => {
  const Real = window.VideoFrame;
  const last = new WeakMap();
  window.VideoFrame = function (video) {
    const now = new Real(video), before = last.get(video);
    last.set(video, now.clone());
    if (!before || before.timestamp === now.timestamp) return now;
    now.close();
    return before;
  };
}"""
"""JavaScript: a video that gives the frame before at first, as it does on a busy machine."""


def test_steps_while_the_screen_lags(pair: Pair) -> None:
    pair.page.evaluate(STALE)
    assert pair.load("short")
    for _ in range(30):
        pair.call("player.step(1)")
    painted = pair.painted()
    assert unequal(painted) == []
    assert [number for number, _, _ in painted] == list(range(31))


def test_steps_without_webcodecs(pair: Pair) -> None:
    """Browsers have none on plain HTTP, and frames are known by what was announced."""
    pair.page.evaluate("delete window.VideoFrame")
    assert pair.load("usual")
    for _ in range(20):
        pair.call("player.step(1)")
        pair.call("player.step(-1)")
    painted = pair.painted()
    assert unequal(painted) == []
    assert [number for number, _, _ in painted] == [0, *[1, 0] * 20]


@pytest.mark.parametrize("kind", KINDS)
def test_playing_from_a_copy(pair: Pair, kind: str) -> None:
    """Steps among copied frames move no video, and playing goes on from the pair that is shown."""
    assert pair.load(kind)
    for frame in (10, 11, 12, 11):
        pair.call(f"player.seek({frame})")
    pair.painted()
    pair.call("player.play()")
    wait_until(lambda: pair.call("player.frame") > 20, limit_s=60)
    pair.call("player.pause()")
    painted = pair.painted()
    assert unequal(painted) == []
    assert 11 < painted[0][0] <= 14


@pytest.mark.parametrize("kind", KINDS)
def test_seeks(pair: Pair, kind: str) -> None:
    assert pair.load(kind)
    chance = random.Random(1)
    targets = [chance.randrange(FRAMES) for _ in range(60)] + [FRAMES - 1, 0]
    for target in targets:
        pair.call(f"player.seek({target})")
    painted = pair.painted()
    assert unequal(painted) == []
    assert [number for number, _, _ in painted] == [0, *targets]


def test_scrubbing_makes_the_last_of_many_seeks(pair: Pair) -> None:
    assert pair.load("usual")
    pair.call("Promise.all([...Array(60).keys()].map((frame) => player.seek(frame + 1)))")
    painted = pair.painted()
    assert unequal(painted) == []
    assert painted[-1][0] == 60
    assert len(painted) < 30


@pytest.mark.parametrize("kind", KINDS)
def test_playback_in_a_loop(pair: Pair, kind: str) -> None:
    assert pair.load(kind)
    pair.call("player.play()")
    wait_until(lambda: pair.call("player.provenance().replays") == 2, limit_s=60, every_s=0.5)
    pair.call("player.pause()")
    painted = pair.painted()
    assert unequal(painted) == []
    numbers = [number for number, _, _ in painted]
    assert len(numbers) > FRAMES, "most pairs of two rounds are shown, also on a busy machine"
    backwards = [n for n, after in pairwise(numbers) if after < n]
    assert len(backwards) == 2, "only a loop goes back"
    seen = pair.call("player.provenance()")
    assert seen["frames_seen"] == [len(set(numbers))] * 2
    assert seen["dropped_frames"] < FRAMES
