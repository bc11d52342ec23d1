"""Rendering: position and size follow the layout, and everything is inside the frame."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.architecture import HEIGHT_PX, NUM_FRAMES, WIDTH_PX
from mini.world.render import DISTANCES, Layout, layout, render, render_scene, tracks
from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXAMPLE,
    MOTIONS,
    Scene,
    Split,
    Thing,
    sample_scene,
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_everything_stays_inside_the_frame(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng, Split.TRAIN)
    frames = render_scene(scene, rng)
    assert frames.shape == (NUM_FRAMES, HEIGHT_PX, WIDTH_PX, 3)
    border = torch.cat([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
    assert (border == torch.tensor(BACKGROUNDS[scene.background], dtype=torch.uint8)).all()


@pytest.mark.parametrize("shape", DISTANCES)
def test_a_shape_fills_its_area_with_its_colour(shape: str) -> None:
    scene = Scene((Thing("large", "green", shape),), "still", "black")
    scene_layout = Layout([[48.0] * NUM_FRAMES], [[48.0] * NUM_FRAMES], [[20.0] * NUM_FRAMES])
    frame = render(tracks([scene], [scene_layout]))[0, :, 0]
    axis = torch.linspace(-1.2, 1.2, 2401)
    area = (DISTANCES[shape](axis[None], axis[:, None]) < 0).float().mean() * 2.4**2 * 20**2
    ground = torch.tensor(BACKGROUNDS["black"])[:, None, None] / 255
    colour = torch.tensor(COLOURS["green"])[:, None, None] / 255
    coverage = ((frame - ground) / (colour - ground)).mean(0)
    assert coverage.sum().item() == pytest.approx(area.item(), rel=0.02)
    assert coverage.max().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("motion", "expected"),
    [("right", (1, 0)), ("left", (-1, 0)), ("up", (0, -1)), ("down", (0, 1))],
)
def test_travel_has_the_direction_of_its_motion(motion: str, expected: tuple[int, int]) -> None:
    scene_layout = layout(Scene(EXAMPLE.things, motion, "black"), random.Random(0))
    moved = (
        scene_layout.x[0][-1] - scene_layout.x[0][0],
        scene_layout.y[0][-1] - scene_layout.y[0][0],
    )
    assert tuple(np.sign(np.round(moved, 6))) == expected


def test_growing_and_shrinking_change_the_radius_only() -> None:
    for motion, factor in (("growing", 1.7), ("shrinking", 0.55)):
        scene_layout = layout(Scene(EXAMPLE.things, motion, "black"), random.Random(0))
        assert scene_layout.radius[0][-1] / scene_layout.radius[0][0] == pytest.approx(factor)
        assert len(set(scene_layout.x[0])) == len(set(scene_layout.y[0])) == 1


def test_a_batch_is_rendered_like_its_scenes_one_by_one() -> None:
    rng = random.Random(3)
    scenes = [sample_scene(rng, Split.TRAIN, pair_share=0.5) for _ in range(8)]
    layouts = [layout(scene, rng) for scene in scenes]
    together = render(tracks(scenes, layouts))
    for index, (scene, scene_layout) in enumerate(zip(scenes, layouts, strict=True)):
        assert torch.equal(together[index], render(tracks([scene], [scene_layout]))[0])


def test_every_motion_has_a_path() -> None:
    for motion in MOTIONS:
        scene_layout = layout(Scene(EXAMPLE.things, motion, "gray"), random.Random(1))
        assert len(scene_layout.x[0]) == NUM_FRAMES
