"""The graded measures are exact on rendered scenes and grow with each fault, drawn on purpose."""

import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from mini.world.graded import LOST_PX, colour_error, path_error, sharpness
from mini.world.render import layout, render, render_scene, tracks
from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXAMPLE,
    MOTIONS,
    PAIR_MOTIONS,
    SHAPES,
    Scene,
    Split,
    Thing,
    sample_scene,
)

Frames = NDArray[np.uint8]

PAIR = Scene(
    (Thing("small", "blue", "star"), Thing("large", "pink", "ring")), "down", "white", "above"
)
STILL = replace(EXAMPLE, motion="still")


def rendered(scene: Scene, seed: int = 0) -> Frames:
    frames: Frames = render_scene(scene, random.Random(seed)).numpy()
    return frames


def to_uint8(frames: NDArray[np.float64]) -> Frames:
    return np.rint(frames.clip(0, 255)).astype(np.uint8)


def shaken(scene: Scene, by_px: float) -> tuple[Frames, float]:
    """Return a video whose things jump at every frame, and the mean distance of the jumps."""
    exact = layout(scene, random.Random(0))
    jumps = np.random.default_rng(0).normal(0, by_px, (2, *np.shape(exact.x)))
    moved = replace(
        exact, x=(np.array(exact.x) + jumps[0]).tolist(), y=(np.array(exact.y) + jumps[1]).tolist()
    )
    video = render(tracks([scene], [moved]))[0].permute(1, 2, 3, 0).numpy() * 255
    return to_uint8(video), float(np.hypot(*jumps).mean())


def test_a_rendered_scene_has_no_error() -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng, Split.EVALUATION, pair_share=0.5) for _ in range(20)]
    scenes += [
        Scene((Thing("small", "yellow", shape),), motion, "gray")
        for shape in SHAPES
        for motion in ("shrinking", "circling")
    ]
    scenes += [replace(EXAMPLE, motion=motion) for motion in MOTIONS]
    scenes += [replace(PAIR, motion=motion) for motion in PAIR_MOTIONS]
    for seed, scene in enumerate(scenes):
        frames = rendered(scene, seed)
        assert sharpness(frames, scene) == pytest.approx(1, abs=0.05), scene
        assert colour_error(frames, scene) < 0.5, scene
        assert path_error(frames, scene) < 0.1, scene


@pytest.mark.parametrize("scene", [EXAMPLE, PAIR], ids=["one", "two"])
def test_blur_lowers_sharpness_and_moves_nothing(scene: Scene) -> None:
    exact = rendered(scene).astype(np.float64)
    blurred = [
        to_uint8(ndimage.gaussian_filter(exact, (0, by, by, 0))) for by in (0, 0.5, 0.7, 1, 2)
    ]
    values = [sharpness(each, scene) for each in blurred]
    assert values == sorted(values, reverse=True)
    assert min(-np.diff(values)) > 0.02
    assert values[-1] < 0.6
    assert max(path_error(each, scene) for each in blurred) < 0.2


@pytest.mark.parametrize("scene", [EXAMPLE, PAIR], ids=["one", "two"])
def test_a_tint_raises_the_colour_error_by_its_size(scene: Scene) -> None:
    frames = rendered(scene).astype(np.float64)
    # A blue that both the background and the things have room for, so that nothing is clipped.
    way = np.array([0, 0, 1]) if scene is EXAMPLE else np.array([-1, 0, 0])
    for size in (1, 2, 5, 10, 20):
        tinted = to_uint8(frames + size * way)
        assert colour_error(tinted, scene) == pytest.approx(size, abs=0.5)
        assert sharpness(tinted, scene) == pytest.approx(1, abs=0.05)
        assert path_error(tinted, scene) < 0.1


@pytest.mark.parametrize("motion", MOTIONS)
def test_shaking_raises_the_path_error_by_its_size(motion: str) -> None:
    scene = replace(EXAMPLE, motion=motion)
    errors = []
    for by_px in (0, 0.5, 1, 2, 4):
        frames, size = shaken(scene, by_px)
        errors.append(path_error(frames, scene))
        # The nearest path follows some of the jumps.
        assert 0.65 * size - 0.02 < errors[-1] < 1.1 * size + 0.1
    assert errors == sorted(errors)


def test_another_motion_is_off_the_path() -> None:
    pairs = [("right", "left"), ("still", "up"), ("up", "still"), ("bouncing", "swaying")]
    pairs += [("circling", "right"), ("down", "circling"), ("swaying", "growing")]
    for seed, (shown, asked) in enumerate(pairs):
        frames = rendered(replace(EXAMPLE, motion=shown), seed)
        assert path_error(frames, replace(EXAMPLE, motion=asked)) > 5, (shown, asked)


def test_circling_may_go_either_way_round() -> None:
    scene = replace(EXAMPLE, motion="circling")
    assert path_error(rendered(scene)[::-1], scene) < 0.1


def test_another_colour_counts_by_its_distance() -> None:
    frames = rendered(STILL)
    asked = replace(STILL, things=(replace(STILL.things[0], colour="cyan"),))
    apart = np.linalg.norm(np.subtract(COLOURS["red"], COLOURS["cyan"]))
    # The background, the other surface, is right.
    assert colour_error(frames, asked) == pytest.approx(apart / 2, abs=0.5)


def test_things_of_a_pair_are_told_apart_by_their_colours() -> None:
    frames = rendered(PAIR)
    frames[:, 2:12, 2:12] = COLOURS["green"]  # a third, larger than the star
    assert colour_error(frames, PAIR) < 0.5
    assert path_error(frames, PAIR) < 0.1
    assert sharpness(frames, PAIR) == pytest.approx(1, abs=0.05)


def test_what_a_frame_does_not_show_counts_as_the_worst() -> None:
    frames = rendered(STILL)
    frames[:4] = BACKGROUNDS["black"]
    share = 4 / len(frames)
    lost = np.linalg.norm(np.subtract(COLOURS["red"], BACKGROUNDS["black"]))
    assert path_error(frames, STILL) == pytest.approx(share * LOST_PX, abs=0.1)
    assert colour_error(frames, STILL) == pytest.approx(share * lost / 2, abs=0.5)
    assert sharpness(frames, STILL) == pytest.approx(1 - share, abs=0.05)


def test_an_empty_video_gets_the_worst_numbers() -> None:
    frames = np.full((17, 96, 96, 3), BACKGROUNDS["white"], dtype=np.uint8)
    assert sharpness(frames, PAIR) == 0
    assert path_error(frames, PAIR) == LOST_PX
    apart = [np.linalg.norm(np.subtract(COLOURS[each.colour], 245)) for each in PAIR.things]
    assert colour_error(frames, PAIR) == pytest.approx(sum(apart) / 3)


def test_noise_and_specks_have_numbers_as_well() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (17, 96, 96, 3), dtype=np.uint8)
    specks = np.full((17, 96, 96, 3), 10, dtype=np.uint8)
    specks[rng.random((17, 96, 96)) < 0.05] = 255
    for frames in (noise, specks):
        for scene in (EXAMPLE, PAIR):
            found = [measure(frames, scene) for measure in (sharpness, colour_error, path_error)]
            assert np.isfinite(found).all()
            assert found[1] > 30
            assert found[2] > 3


def test_a_path_needs_the_videos_of_this_world() -> None:
    frames = rendered(EXAMPLE)
    for other in (frames[:9], frames[:, :64]):
        with pytest.raises(ValueError, match="17 frames of 96x96"):
            path_error(other, EXAMPLE)
        assert colour_error(other, EXAMPLE) >= 0
