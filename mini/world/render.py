"""Render scenes: turn facts and a random layout into frames, in batches on a CPU or a GPU.

Shapes are signed distance functions, so anti-aliasing over one pixel costs nothing extra and shapes
can move by fractions of a pixel. There are no texts and no textures, because the miniature's VAE
has 2.6 M parameters only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini.architecture import HEIGHT_PX, NUM_FRAMES, WIDTH_PX
from mini.world.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

RADIUS_PX = {"small": (8.5, 10.0), "large": (15.0, 17.0)}
GROWTH, SHRINKAGE = 1.7, 0.55
# Pixels from the first to the last frame of one thing that moves straight on, and of two.
TRAVEL_RANGE_PX, PAIR_TRAVEL_RANGE_PX = (36.0, 46.0), (11.0, 13.0)
SWING_RANGE_PX = (13.0, 17.0)
SHAPE_NAMES = tuple(SHAPES)


@dataclass(frozen=True, slots=True)
class Layout:
    """The positions and radii in pixels: one list per thing, with one value per frame."""

    x: list[list[float]]
    y: list[list[float]]
    radius: list[list[float]]


def layout(scene: Scene, rng: random.Random) -> Layout:
    """Draw a random layout that shows the scene's facts, with everything inside the frame."""
    times = [frame / (NUM_FRAMES - 1) for frame in range(NUM_FRAMES)]
    path = _path(scene.motion, rng, pair=scene.relation is not None)
    centres = _centres(scene, rng)
    x, y, radius = [], [], []
    for thing, (centre_x, centre_y) in zip(scene.things, centres, strict=True):
        start = rng.uniform(*RADIUS_PX[thing.size])
        moved = [path(time) for time in times]
        x.append([centre_x + dx for dx, _, _ in moved])
        y.append([centre_y + dy for _, dy, _ in moved])
        radius.append([start * factor for _, _, factor in moved])
    return Layout(x, y, radius)


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    middle_x, middle_y = WIDTH_PX / 2, HEIGHT_PX / 2
    if scene.relation is None:
        return [(middle_x + rng.uniform(-4, 4), middle_y + rng.uniform(-4, 4))]
    apart, first, second = rng.uniform(22, 23.5), rng.uniform(-4, 4), rng.uniform(-4, 4)
    if scene.relation == "left":
        return [(middle_x - apart, middle_y + first), (middle_x + apart, middle_y + second)]
    return [(middle_x + first, middle_y - apart), (middle_x + second, middle_y + apart)]


Path = Callable[[float], tuple[float, float, float]]


def _path(motion: str, rng: random.Random, pair: bool) -> Path:
    """Draw a path of this motion."""
    travel = rng.uniform(*(PAIR_TRAVEL_RANGE_PX if pair else TRAVEL_RANGE_PX))
    swing = rng.uniform(*SWING_RANGE_PX)
    phase = rng.uniform(0, 2 * math.pi)
    return path_of(motion, travel, swing, phase, rng.choice((-1, 1)))


def path_of(motion: str, travel: float, swing: float, phase: float = 0, side: int = 1) -> Path:
    """Return a function from time 0..1 to displacement (dx, dy) in pixels and radius factor.

    Args:
        travel: pixels from start to end of a straight motion.
        swing: pixels that the other motions swing by; circling has it as radius.
        phase: where circling starts, in radians.
        side: where swaying goes first: 1 is right, -1 left.
    """
    paths: dict[str, Path] = {
        "still": lambda t: (0.0, 0.0, 1.0),
        "right": lambda t: (travel * (t - 0.5), 0.0, 1.0),
        "left": lambda t: (travel * (0.5 - t), 0.0, 1.0),
        "up": lambda t: (0.0, travel * (0.5 - t), 1.0),
        "down": lambda t: (0.0, travel * (t - 0.5), 1.0),
        "circling": lambda t: (
            swing * math.cos(2 * math.pi * t + phase),
            swing * math.sin(2 * math.pi * t + phase),
            1.0,
        ),
        "bouncing": lambda t: (0.0, 10 - 1.3 * swing * abs(math.sin(2 * math.pi * t)), 1.0),
        "swaying": lambda t: (1.2 * side * swing * math.sin(2 * math.pi * t), 0.0, 1.0),
        "growing": lambda t: (0.0, 0.0, 1 + (GROWTH - 1) * t),
        "shrinking": lambda t: (0.0, 0.0, 1 + (SHRINKAGE - 1) * t),
    }
    return paths[motion]


@dataclass(frozen=True, slots=True)
class Tracks:
    """A batch of laid-out scenes as tensors.

    O is 2, the largest number of things. The second thing of a scene with one has radius 0.

    Attributes:
        position: [B, O, F, 2] pixels (x, y).
        radius: [B, O, F] pixels.
        shape: [B, O] index into SHAPE_NAMES.
        colour: [B, O, 3] in 0..1.
        background: [B, 3] in 0..1.
    """

    position: Tensor
    radius: Tensor
    shape: Tensor
    colour: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> Tracks:
        """Return the batch on another device."""
        return Tracks(*(getattr(self, name).to(device) for name in self.__slots__))

    def select(self, index: Tensor | slice) -> Tracks:
        """Return the scenes at `index`."""
        return Tracks(*(getattr(self, name)[index] for name in self.__slots__))


def tracks(scenes: Sequence[Scene], layouts: Sequence[Layout]) -> Tracks:
    """Build a batch of scenes and their layouts."""
    count = len(scenes)
    position = torch.zeros(count, 2, NUM_FRAMES, 2)
    radius = torch.zeros(count, 2, NUM_FRAMES)
    for index, scene_layout in enumerate(layouts):
        things = len(scene_layout.x)
        position[index, :things] = torch.tensor([scene_layout.x, scene_layout.y]).permute(1, 2, 0)
        radius[index, :things] = torch.tensor(scene_layout.radius)
    unused = Thing("small", "red", "circle")
    pairs = [(*scene.things, unused)[:2] for scene in scenes]
    return Tracks(
        position=position,
        radius=radius,
        shape=torch.tensor([[SHAPE_NAMES.index(t.shape) for t in pair] for pair in pairs]),
        colour=torch.tensor([[COLOURS[t.colour] for t in pair] for pair in pairs]) / 255,
        background=torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) / 255,
    )


def render(batch: Tracks) -> Tensor:
    """Render a batch: [B, 3, F, H, W] float32 in 0..1, on the batch's device."""
    device = batch.position.device
    count, things, frames, _ = batch.position.shape
    ys = torch.arange(HEIGHT_PX, device=device, dtype=torch.float32)[:, None] + 0.5
    xs = torch.arange(WIDTH_PX, device=device, dtype=torch.float32)[None, :] + 0.5
    video = batch.background[:, :, None, None, None].expand(-1, -1, frames, HEIGHT_PX, WIDTH_PX)
    video = video.contiguous()
    for thing in range(things):
        coverage = torch.zeros(count, frames, HEIGHT_PX, WIDTH_PX, device=device)
        for index, name in enumerate(SHAPE_NAMES):
            chosen = (batch.shape[:, thing] == index) & (batch.radius[:, thing, 0] > 0)
            if not chosen.any():
                continue
            centre = batch.position[chosen, thing][..., None, None, :]
            radius = batch.radius[chosen, thing][..., None, None]
            coverage[chosen] = coverage_of(name, xs - centre[..., 0], ys - centre[..., 1], radius)
        video = torch.lerp(video, batch.colour[:, thing, :, None, None, None], coverage[:, None])
    return video


def coverage_of(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return how much of each pixel a shape covers, in 0..1.

    Args:
        x: the pixels' middles relative to the shape's centre, in pixels; broadcastable with `y`.
        radius: in pixels, broadcastable with both.
    """
    return (0.5 - DISTANCES[shape](x / radius, y / radius) * radius).clamp(0, 1)


def render_scene(scene: Scene, rng: random.Random) -> Tensor:
    """Render one scene as video frames: [F, H, W, 3] uint8."""
    video = render(tracks([scene], [layout(scene, rng)]))[0]
    return (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8)


# Signed distances in units of the radius, y down; negative inside. Every shape fits in |p| <= 1.1.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.85, 0.85)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    # Upright: one side below, apex at y = -1.05; its centroid sits at the origin.
    return torch.maximum(0.866 * x.abs() - 0.5 * y - 0.525, y - 0.525)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane onto one of ten equal wedges; there a star is one half-plane.
    angle = torch.atan2(x, -y)
    wedge = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    length = torch.hypot(x, y)
    along, across = length * torch.cos(wedge), length * torch.sin(wedge).abs()
    outer, inner = 1.1, 0.48
    valley_along = inner * math.cos(math.pi / 5)
    valley_across = inner * math.sin(math.pi / 5)
    normal_along, normal_across = valley_across, outer - valley_along
    norm = math.hypot(normal_along, normal_across)
    return ((along - outer) * normal_along + across * normal_across) / norm


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
