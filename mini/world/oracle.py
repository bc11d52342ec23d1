"""Recognize what a video shows, by classical image processing without learned weights or caption.

Colours are compared with the world's background and object colours. Objects are connected regions
(blobs). A shape is the silhouette template with the largest overlap. A motion is determined from
the path of the centroid. `verdicts` then compares the result with a caption's scene, attribute by
attribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from mini.world.render import DISTANCES, RADIUS_PX, SHAPE_NAMES
from mini.world.scenes import BACKGROUNDS, COLOURS, Scene, Thing

Frames = NDArray[np.uint8]
Values = NDArray[np.float64]

ATTRIBUTES = ("shape", "colour", "size", "motion", "background", "relation")

# Distances in 8-bit RGB. The closest object and background colours (purple on gray) are 101 apart.
OBJECT_DISTANCE = 50.0
BACKGROUND_DISTANCE = 40.0
SMALLEST_BLOB_PX = 40
# A second blob is a second object if it has this share of the largest blob's area in this share of
# the frames. For the smallest triangle and the largest square the area is 0.12.
SECOND_AREA, SECOND_FRAMES = 0.09, 0.5
# A colour or an object must be present in this share of the frames.
STEADY = 0.75
TEMPLATE_PX = 48
# The boundary is the geometric mean of the largest small and the smallest large radius.
SIZE_BOUNDARY_PX = (RADIUS_PX["small"][1] * RADIUS_PX["large"][0]) ** 0.5
# Thresholds of motion in pixels and as ratio of radii. In the world, travel is at least 11, growth
# 1.7 and shrinkage 0.55.
STILL_PX, TRAVEL_PX = 6.0, 7.0
GREW, SHRANK = 1.3, 0.77


@dataclass(frozen=True, slots=True)
class Blob:
    """A connected region of one frame that is not background."""

    area_px: float
    x: float
    y: float
    colour: str
    silhouette: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """The facts that a video shows; a field is None if the video does not show it steadily."""

    things: tuple[RecognizedThing, ...]
    background: str | None
    motion: str | None
    relation: str | None


@dataclass(frozen=True, slots=True)
class RecognizedThing:
    """An object tracked through the frames; a field is None if it was not steady enough."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float


def read(frames: Frames) -> Reading:
    """Recognize what a video shows.

    Args:
        frames: [F, H, W, 3] uint8.
    """
    background, ground = read_background(frames)
    blobs = [_blobs(frame.astype(np.float64), ground) for frame in frames]
    tracked = [path for path in _track(blobs) if len(path) >= STEADY * len(frames)]
    motions = [_motion(path, len(frames)) for path in tracked]
    things = tuple(
        _thing(path, len(frames), motion) for path, motion in zip(tracked, motions, strict=True)
    )
    motion = motions[0] if motions and len(set(motions)) == 1 else None
    return Reading(things, background, motion, _relation(things))


def verdicts(frames: Frames, scene: Scene) -> dict[str, bool]:
    """Return for each attribute whether the video matches the scene; `relation` only for pairs.

    Args:
        frames: [F, H, W, 3] uint8.
    """
    return compare(read(frames), scene)


def compare(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Return for each attribute whether the reading matches the scene.

    Shape, colour and size only match if the number of objects does.
    """
    pairs = _assign(reading.things, scene.things)
    complete = len(reading.things) == len(scene.things)
    matches = {
        "shape": complete and all(found.shape == thing.shape for found, thing in pairs),
        "colour": complete and all(found.colour == thing.colour for found, thing in pairs),
        "size": complete and all(found.size == thing.size for found, thing in pairs),
        "motion": reading.motion == scene.motion,
        "background": reading.background == scene.background,
    }
    if scene.relation is not None:
        ordered = _relation(tuple(found for found, _ in pairs)) if complete else None
        matches["relation"] = ordered == scene.relation
    return matches


def _assign(
    found: tuple[RecognizedThing, ...], expected: tuple[Thing, ...]
) -> list[tuple[RecognizedThing, Thing]]:
    """Pair recognized with expected things so that most attributes agree."""

    def agreement(pairs: list[tuple[RecognizedThing, Thing]]) -> int:
        return sum(
            2 * (a.colour == b.colour) + (a.shape == b.shape) + (a.size == b.size) for a, b in pairs
        )

    same_order = list(zip(found, expected, strict=False))
    reversed_order = list(zip(reversed(found), expected, strict=False))
    return max(same_order, reversed_order, key=agreement)


def read_background(frames: Frames) -> tuple[str | None, Values]:
    """Return the background's name, if it is steady, and its colour [3] in the video."""
    border = np.concatenate(
        [frames[:, :3].reshape(len(frames), -1, 3), frames[:, -3:].reshape(len(frames), -1, 3)], 1
    ).astype(np.float64)
    per_frame = np.median(border, axis=1)
    names = [_nearest(colour, BACKGROUNDS, BACKGROUND_DISTANCE) for colour in per_frame]
    name, count = Counter(names).most_common(1)[0]
    return (name if count >= STEADY * len(frames) else None), np.median(per_frame, axis=0)


def _nearest(
    colour: Values, named: dict[str, tuple[int, int, int]], within: float = np.inf
) -> str | None:
    distances = {n: float(np.linalg.norm(colour - np.array(rgb))) for n, rgb in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= within else None


def regions(
    frame: Values, ground: Values
) -> Iterator[tuple[tuple[slice, slice], NDArray[np.bool_]]]:
    """Yield each connected region that is not background: its box, and its pixels in the box.

    Args:
        frame: [H, W, 3] in 0..255.
        ground: [3], the background's colour.
    """
    distance = np.linalg.norm(frame - ground, axis=-1)
    labels, _ = ndimage.label(distance > OBJECT_DISTANCE, structure=np.ones((3, 3)))
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        yield box, labels[box] == index


def _blobs(frame: Values, ground: Values) -> list[Blob]:
    """Return the blobs of one frame, largest first."""
    found = []
    for box, inside in regions(frame, ground):
        blob = _blob(frame[box], inside, ground)
        if blob.area_px >= SMALLEST_BLOB_PX:
            top, left = box[0].start, box[1].start
            found.append(replace(blob, x=blob.x + left, y=blob.y + top))
    return sorted(found, key=lambda blob: -blob.area_px)


def _blob(pixels: Values, inside: NDArray[np.bool_], ground: Values) -> Blob:
    """Build the blob of one region from the part of the frame that contains it.

    Its position is relative to that part. Its outline is where a pixel is half object and half
    background. A fixed threshold would include the blur around a bright object and fill the hole of
    a ring.
    """
    core = ndimage.binary_erosion(inside)
    colour = np.median(pixels[core if core.sum() >= 9 else inside], axis=0)
    name = _nearest(colour, COLOURS)
    assert name is not None, "without a distance bound some colour is nearest"
    distance = np.linalg.norm(pixels - ground, axis=-1)
    solid = inside & (distance > 0.5 * np.linalg.norm(colour - ground))
    rows, columns = np.nonzero(solid if solid.any() else inside)
    area, x, y = float(len(rows)), float(columns.mean()), float(rows.mean())
    return Blob(area, x, y, name, _normalised(solid, x, y, area))


def _normalised(inside: NDArray[np.bool_], x: float, y: float, area: float) -> NDArray[np.bool_]:
    """Resample a silhouette to a grid of TEMPLATE_PX: centred, covering a quarter of its area."""
    scale = np.sqrt(area) / (TEMPLATE_PX / 2)
    grid = (np.arange(TEMPLATE_PX) - (TEMPLATE_PX - 1) / 2) * scale
    coordinates = np.meshgrid(grid + y, grid + x, indexing="ij")
    sampled: Values = ndimage.map_coordinates(inside.astype(np.float64), coordinates, order=1)
    return sampled > 0.5


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    """Return the silhouette of each shape, normalised as for blobs."""
    axis = torch.linspace(-1.25, 1.25, 401)
    templates = {}
    for name in SHAPE_NAMES:
        inside = (DISTANCES[name](axis[None, :], axis[:, None]) < 0).numpy()
        rows, columns = np.nonzero(inside)
        templates[name] = _normalised(inside, columns.mean(), rows.mean(), float(inside.sum()))
    return templates


@cache
def area_of_unit(shape: str) -> float:
    """Return the area of a shape of radius 1."""
    axis = torch.linspace(-1.25, 1.25, 1001)
    inside = DISTANCES[shape](axis[None, :], axis[:, None]) < 0
    return float(inside.float().mean()) * 2.5**2


def _track(blobs: list[list[Blob]]) -> list[dict[int, Blob]]:
    """Return a path (frame → blob) of each object, up to three; two in a scene differ in colour."""
    if not _has_another(blobs, 1):
        return [_ranked(blobs, 0)]
    if _has_another(blobs, 2):
        return [_ranked(blobs, rank) for rank in range(3)]
    colour_counts = Counter(blob.colour for frame in blobs for blob in frame[:2])
    colours = [colour for colour, _ in colour_counts.most_common(2)]
    if len(colours) == 1:
        return [_ranked(blobs, rank) for rank in range(2)]
    paths: list[dict[int, Blob]] = []
    for colour in colours:
        of_colour = ((i, [b for b in frame if b.colour == colour]) for i, frame in enumerate(blobs))
        paths.append({index: found[0] for index, found in of_colour if found})
    return paths


def _has_another(blobs: list[list[Blob]], rank: int) -> bool:
    """Return whether the blob of this rank by area is often large enough to be an object."""
    count = sum(
        len(frame) > rank and frame[rank].area_px > SECOND_AREA * frame[0].area_px
        for frame in blobs
    )
    return count >= SECOND_FRAMES * len(blobs)


def _ranked(blobs: list[list[Blob]], rank: int) -> dict[int, Blob]:
    return {index: frame[rank] for index, frame in enumerate(blobs) if len(frame) > rank}


def _thing(path: dict[int, Blob], frames: int, motion: str | None) -> RecognizedThing:
    colour, count = Counter(blob.colour for blob in path.values()).most_common(1)[0]
    shape = _shape(path)
    return RecognizedThing(
        size=_size(path, shape, motion),
        colour=colour if count >= STEADY * frames else None,
        shape=shape,
        x=float(np.mean([blob.x for blob in path.values()])),
        y=float(np.mean([blob.y for blob in path.values()])),
    )


def _shape(path: dict[int, Blob]) -> str:
    """Return the template with the largest summed overlap (intersection over union)."""
    overlap: Counter[str] = Counter()
    for blob in path.values():
        for name, template in _templates().items():
            union = np.count_nonzero(blob.silhouette | template)
            # Larger blobs show their shape better.
            weight = blob.area_px**0.5
            overlap[name] += int(
                1000 * weight * np.count_nonzero(blob.silhouette & template) / max(union, 1)
            )
    return overlap.most_common(1)[0][0]


def _size(path: dict[int, Blob], shape: str, motion: str | None) -> str:
    """Return the size at the start; for a thing of constant size, the median over all frames."""
    radii = [(blob.area_px / area_of_unit(shape)) ** 0.5 for _, blob in sorted(path.items())]
    changing = motion in ("growing", "shrinking")
    radius = float(np.median(radii[:2] if changing else radii))
    return "small" if radius < SIZE_BOUNDARY_PX else "large"


def _motion(path: dict[int, Blob], frames: int) -> str | None:
    steps = sorted(path)
    if steps[0] > frames // 4 or steps[-1] < frames - 1 - frames // 4:
        return None
    area = np.array([path[step].area_px for step in steps])
    grown = float(np.sqrt(area[-2:].mean() / area[:2].mean()))
    if grown > GREW:
        return "growing"
    if grown < SHRANK:
        return "shrinking"
    return _path_motion(
        np.array([path[step].x for step in steps]), np.array([path[step].y for step in steps])
    )


def _path_motion(x: Values, y: Values) -> str | None:
    range_x, range_y = float(np.ptp(x)), float(np.ptp(y))
    if max(range_x, range_y) < STILL_PX:
        return "still"
    net_x, net_y = float(x[-1] - x[0]), float(y[-1] - y[0])
    net, widest = max(abs(net_x), abs(net_y)), max(range_x, range_y)
    sideways, upright = range_x > 2 * range_y, range_y > 2 * range_x
    if net > TRAVEL_PX and net > 0.7 * widest:
        if sideways:
            return "right" if net_x > 0 else "left"
        return ("down" if net_y > 0 else "up") if upright else None
    if sideways or upright:
        return "swaying" if sideways else "bouncing"
    return "circling" if _goes_round(x, y) else None


def _goes_round(x: Values, y: Values) -> bool:
    """Return whether the path goes round its centre once at a nearly constant distance."""
    across, down = x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2
    distance, angle = np.hypot(across, down), np.unwrap(np.arctan2(down, across))
    turns = abs(float(angle[-1] - angle[0])) / (2 * np.pi)
    return bool(distance.std() < 0.3 * distance.mean()) and 0.7 < turns < 1.3


def _relation(things: tuple[RecognizedThing, ...]) -> str | None:
    """Return the first thing's position with respect to the second: left, right, above or below."""
    if len(things) != 2:
        return None
    across, down = things[1].x - things[0].x, things[1].y - things[0].y
    if abs(across) > abs(down):
        return "left" if across > 0 else "right"
    return "above" if down > 0 else "below"
