"""The oracle recognizes rendered scenes, rejects other scenes, and handles damaged videos.

benchmarks/quality/oracle.py measures its rates over 2,000 scenes. Here every attribute and every
value occurs at least once, and typical faults of generated videos are drawn on purpose.
"""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.quality.oracle import change_attribute
from mini.world.oracle import ATTRIBUTES, read, verdicts
from mini.world.render import render_scene
from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXAMPLE,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    sample_scene,
)

Frames = NDArray[np.uint8]


def rendered(scene: Scene, seed: int = 0) -> Frames:
    frames: Frames = render_scene(scene, random.Random(seed)).numpy()
    return frames


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_reads_every_shape_at_every_size(shape: str, size: str) -> None:
    for background, motion in (("white", "still"), ("navy", "growing"), ("gray", "shrinking")):
        scene = Scene((Thing(size, "red", shape),), motion, background)
        assert all(verdicts(rendered(scene), scene).values()), (scene, read(rendered(scene)))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_reads_every_colour_on_every_background(colour: str, background: str) -> None:
    scene = Scene((Thing("small", colour, "circle"),), "right", background)
    assert all(verdicts(rendered(scene), scene).values()), read(rendered(scene))


@pytest.mark.parametrize("motion", MOTIONS)
def test_reads_every_motion(motion: str) -> None:
    for seed in range(5):
        scene = Scene(EXAMPLE.things, motion, "black")
        assert read(rendered(scene, seed)).motion == motion


def test_rejects_the_caption_with_one_attribute_changed() -> None:
    rng = random.Random(2)
    tested = set()
    for _ in range(60):
        scene = sample_scene(rng, Split.EVALUATION, pair_share=0.5)
        frames = rendered(scene)
        for name, shown in verdicts(frames, scene).items():
            assert shown, (scene, name)
            other = verdicts(frames, change_attribute(scene, name, rng))
            assert not other[name], (scene, name)
            tested.add(name)
    assert tested == set(ATTRIBUTES)


def test_an_empty_video_shows_only_its_background() -> None:
    frames = np.full((17, 96, 96, 3), BACKGROUNDS["navy"], dtype=np.uint8)
    shown = verdicts(frames, Scene(EXAMPLE.things, "still", "navy"))
    assert shown["background"]
    assert not any(shown[name] for name in ("shape", "colour", "size", "motion"))


def test_noise_shows_nothing() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (17, 96, 96, 3), dtype=np.uint8)
    shown = verdicts(frames, EXAMPLE)
    assert not any(shown.values())


def test_a_second_object_is_not_overlooked() -> None:
    frames = rendered(Scene(EXAMPLE.things, "still", "black"))
    frames[:, 70:84, 70:84] = COLOURS["blue"]
    shown = verdicts(frames, Scene(EXAMPLE.things, "still", "black"))
    assert not shown["shape"]
    assert not shown["colour"]


def test_a_third_object_is_not_overlooked() -> None:
    pair = (Thing("large", "red", "circle"), Thing("large", "blue", "star"))
    scene = Scene(pair, "still", "white", "left")
    frames = rendered(scene)
    frames[:, 4:20, 40:56] = COLOURS["green"]
    shown = verdicts(frames, scene)
    assert not shown["shape"]
    assert not shown["colour"]


def test_jumping_about_is_no_motion() -> None:
    positions = np.random.default_rng(1).integers(10, 70, (17, 2))
    frames = np.full((17, 96, 96, 3), BACKGROUNDS["black"], dtype=np.uint8)
    for frame, (row, column) in zip(frames, positions, strict=True):
        frame[row : row + 16, column : column + 16] = COLOURS["red"]
    assert read(frames).motion is None


def test_a_colour_that_changes_midway_is_no_colour() -> None:
    scene = Scene((Thing("large", "red", "square"),), "still", "black")
    other = Scene((Thing("large", "green", "square"),), "still", "black")
    frames = np.concatenate([rendered(scene)[:9], rendered(other)[9:]])
    assert not verdicts(frames, scene)["colour"]
    assert not verdicts(frames, other)["colour"]


def test_an_object_that_vanishes_halfway_is_not_shown() -> None:
    frames = rendered(Scene(EXAMPLE.things, "still", "black"))
    frames[8:] = BACKGROUNDS["black"]
    shown = verdicts(frames, Scene(EXAMPLE.things, "still", "black"))
    assert not shown["shape"]
    assert not shown["motion"]


def test_swapped_colours_of_a_pair_are_seen() -> None:
    pair = (Thing("large", "red", "circle"), Thing("large", "blue", "star"))
    swapped = (Thing("large", "blue", "circle"), Thing("large", "red", "star"))
    frames = rendered(Scene(pair, "still", "white", "left"))
    shown = verdicts(frames, Scene(swapped, "still", "white", "left"))
    assert not shown["shape"]
    assert shown["size"]


def test_mild_noise_changes_no_verdict() -> None:
    rng = random.Random(9)
    noise = np.random.default_rng(9)
    for _ in range(10):
        scene = sample_scene(rng, Split.EVALUATION)
        frames = rendered(scene).astype(np.float64) + noise.normal(0, 6, (17, 96, 96, 3))
        assert all(verdicts(np.clip(frames, 0, 255).astype(np.uint8), scene).values()), scene
