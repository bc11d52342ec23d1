"""Measure by how much a video misses its caption: sharpness, colour error and path error.

The oracle's verdicts are yes or no, and 8 bits change none of them. These measures are numbers of
the same things, found as the oracle finds them, with the caption known. All are finite for every
video: what a frame does not show counts as the worst case, stated at each measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from mini.architecture import HEIGHT_PX, NUM_FRAMES, WIDTH_PX
from mini.world.oracle import (
    OBJECT_DISTANCE,
    Frames,
    Values,
    area_of_unit,
    read_background,
    regions,
)
from mini.world.render import (
    PAIR_TRAVEL_RANGE_PX,
    SWING_RANGE_PX,
    TRAVEL_RANGE_PX,
    coverage_of,
    path_of,
)
from mini.world.scenes import BACKGROUNDS, COLOURS, Scene, Thing

# Half of the smallest thing at its smallest, a star at the end of shrinking.
SMALLEST_PX = 16
# The pixels around a region in which its edge ends; things of a pair are 6 apart at least.
MARGIN_PX = 3
# Edges are compared after this blur. Otherwise their width would depend on where they lie between
# pixels, and noise would count as softness.
SMOOTHING_PX = 1.0
LOST_PX = WIDTH_PX / 2


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one frame shows of one thing.

    Attributes:
        top: the picture's row of the first row of `coverage`.
        left: the same of columns.
        coverage: [h, w] in 0..1, how much of each pixel is thing and not background.
        colour: [3] in 0..255, the median of its quarter that is farthest from its edge.
    """

    top: int
    left: int
    coverage: Values
    colour: Values

    @property
    def centre(self) -> tuple[float, float]:
        """Return x and y of its centroid in pixels; 0.5 is the middle of the first pixel."""
        rows, columns = np.indices(self.coverage.shape)
        total = self.coverage.sum()
        x, y = (float((self.coverage * at).sum() / total) for at in (columns, rows))
        return self.left + x + 0.5, self.top + y + 0.5


def sharpness(frames: Frames, scene: Scene) -> float:
    """Return how steep the edges are: 1 as the renderer draws them, less if they are blurred.

    Each thing is compared with the caption's shape, rendered in the same place with the same area;
    both are blurred by one pixel first, and the widths of their edges divided. So a Gaussian blur
    of half a pixel gives about 0.92, of one 0.71 and of two 0.47. The mean is over frames and the
    caption's things. A thing that a frame does not show counts as 0.

    Args:
        frames: [F, H, W, 3] uint8.
    """
    return float(
        np.mean(
            [
                _steepness(each, thing.shape) if each else 0.0
                for found in _sightings(frames, scene)
                for each, thing in zip(found, scene.things, strict=True)
            ]
        )
    )


def colour_error(frames: Frames, scene: Scene) -> float:
    """Return the mean distance to the caption's colours in 8-bit RGB: 0 to 441.

    The mean is over frames, and in each over the caption's things and the background. A thing that
    a frame does not show counts as having the background's colour, which is what is there instead.

    Args:
        frames: [F, H, W, 3] uint8.
    """
    _, ground = read_background(frames)
    surface = _distance(ground, BACKGROUNDS[scene.background])
    errors = [
        [
            _distance(each.colour if each else ground, COLOURS[thing.colour])
            for each, thing in zip(found, scene.things, strict=True)
        ]
        for found in _sightings(frames, scene)
    ]
    return float(np.mean([[surface, *each] for each in errors]))


def path_error(frames: Frames, scene: Scene) -> float:
    """Return the mean distance in pixels between each thing and the nearest path it may have.

    The paths are those that the renderer draws for the caption's motion: anywhere in the picture,
    with a travel or swing in its range, from any start and either way round if it circles, to
    either side first if it sways. Of these the one with the smallest sum of squares is taken, for
    each thing by itself. A thing that a frame does not show counts as 48 pixels away, half of the
    picture; no distance counts more. Growing and shrinking things have to stay where they are; by
    how much they grow is not measured.

    Args:
        frames: [17, 96, 96, 3] uint8.

    Raises:
        ValueError: the video has another size or number of frames, for which the world has no path.
    """
    expected = (NUM_FRAMES, HEIGHT_PX, WIDTH_PX)
    if frames.shape[:3] != expected:
        count, height, width = frames.shape[:3]
        raise ValueError(
            f"the path error needs videos of {NUM_FRAMES} frames of {WIDTH_PX}x{HEIGHT_PX}, as the "
            f"miniature's paths are defined for these; this one has {count} of {width}x{height}"
        )
    per_frame = list(_sightings(frames, scene))
    errors = np.full((len(scene.things), NUM_FRAMES), LOST_PX)
    for number in range(len(scene.things)):
        shown = {step: each[number] for step, each in enumerate(per_frame)}
        centres = {step: each.centre for step, each in shown.items() if each}
        if centres:
            steps = np.array(list(centres))
            away = _off_path(steps, np.array(list(centres.values())), scene)
            errors[number, steps] = np.minimum(away, LOST_PX)
    return float(errors.mean())


def _off_path(steps: NDArray[np.int64], centres: Values, scene: Scene) -> Values:
    """Return the distances [N] of centres [N, 2] at these frames to the nearest path."""
    times = steps / (NUM_FRAMES - 1)
    straight = PAIR_TRAVEL_RANGE_PX if scene.relation else TRAVEL_RANGE_PX
    low, high = straight if scene.motion in ("right", "left", "up", "down") else SWING_RANGE_PX
    centred = centres - centres.mean(0)
    fits = []
    for basis in _bases(scene.motion, times):
        # Displacements are linear in the amplitudes [K], and the K patterns are orthogonal and of
        # equal norm, so limiting the amplitude of the free fit gives the best fit within limits.
        moved = basis - basis.mean(1, keepdims=True)
        norm = float((moved[0] ** 2).sum())
        amplitudes = np.einsum("knd,nd->k", moved, centred) / norm if norm else np.zeros(len(moved))
        if len(moved) == 1:
            amplitudes = amplitudes.clip(low, high)
        else:
            size = float(np.hypot(*amplitudes))
            amplitudes *= np.clip(size, low, high) / size if size else 0.0
        left = centred - np.einsum("k,knd->nd", amplitudes, moved)
        fits.append(np.hypot(left[:, 0], left[:, 1]))
    return min(fits, key=lambda each: float((each**2).sum()))


def _bases(motion: str, times: Values) -> list[Values]:
    """Return each kind of path of a motion as K patterns [K, N, 2] of amplitude 1."""

    def pattern(phase: float = 0.0, side: int = 1) -> Values:
        path = path_of(motion, 1.0, 1.0, phase, side)
        return np.array([path(float(time))[:2] for time in times])

    if motion == "circling":
        there = np.stack([pattern(0.0), pattern(math.pi / 2)])
        return [there, there * np.array([1, -1])]
    if motion == "swaying":
        return [pattern(side=1)[None], pattern(side=-1)[None]]
    return [pattern()[None]]


def _sightings(frames: Frames, scene: Scene) -> Iterator[tuple[Sighting | None, ...]]:
    """Yield for each frame what it shows of each of the caption's things, None for nothing."""
    _, ground = read_background(frames)
    for frame in frames:
        yield _in_frame(frame.astype(np.float64), ground, scene.things)


def _in_frame(
    frame: Values, ground: Values, things: tuple[Thing, ...]
) -> tuple[Sighting | None, ...]:
    """Return the largest region for one thing; for two the ones whose colours are nearest."""
    large = [each for each in regions(frame, ground) if each[1].sum() >= SMALLEST_PX]
    large.sort(key=lambda each: -int(each[1].sum()))
    # A third may be what an error has drawn, and larger than a thing.
    found = [
        _sighting(frame, ground, box, inside)
        for box, inside in large[: 1 if len(things) == 1 else 3]
    ]
    found += [None] * (len(things) - len(found))

    def cost(chosen: tuple[Sighting | None, ...]) -> float:
        return sum(
            _distance(each.colour if each else ground, COLOURS[thing.colour])
            for each, thing in zip(chosen, things, strict=True)
        )

    return min(itertools.permutations(found, len(things)), key=cost)


def _sighting(
    frame: Values, ground: Values, box: tuple[slice, slice], inside: NDArray[np.bool_]
) -> Sighting | None:
    """Measure the thing that covers a region; None if it has no colour of its own, as in noise."""
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    deep = depth >= np.quantile(depth[inside], 0.75)
    colour: Values = np.median(frame[box][deep & inside], axis=0)
    around = tuple(
        slice(max(side.start - MARGIN_PX, 0), min(side.stop + MARGIN_PX, length))
        for side, length in zip(box, frame.shape, strict=False)
    )
    near = np.zeros(frame.shape[:2], dtype=np.bool_)
    near[box] = inside
    near = ndimage.binary_dilation(near[around], np.ones((3, 3)), MARGIN_PX)
    contrast = colour - ground
    if np.linalg.norm(contrast) < OBJECT_DISTANCE / 2:
        return None
    coverage = (frame[around] - ground) @ contrast / float(contrast @ contrast)
    coverage = np.where(near, coverage.clip(0, 1), 0.0)
    if coverage.sum() < SMALLEST_PX / 2:
        return None
    return Sighting(around[0].start, around[1].start, coverage, colour)


def _steepness(found: Sighting, shape: str) -> float:
    """Return how wide the edges of a rendered thing are, divided by how wide these are."""
    rows, columns = found.coverage.shape
    x, y = found.centre
    xs = torch.arange(columns, dtype=torch.float32)[None, :] + (found.left + 0.5 - x)
    ys = torch.arange(rows, dtype=torch.float32)[:, None] + (found.top + 0.5 - y)
    radius = torch.tensor((float(found.coverage.sum()) / area_of_unit(shape)) ** 0.5)
    rendered: Values = coverage_of(shape, xs, ys, radius).numpy().astype(np.float64)
    return _edge_width(rendered) / _edge_width(found.coverage)


def _edge_width(coverage: Values) -> float:
    """Return the mean width of edges after `SMOOTHING_PX`, in a unit of its own.

    On a line across an edge, the integral of c (1 - c) grows with the width of the edge, and that
    of the slope is 1. So the ratio of both, summed over an area, is a mean width. What differs from
    either side by less than 10 % is left out, and with it noise inside and outside.

    Args:
        coverage: [h, w] in 0..1.
    """
    smooth = ndimage.gaussian_filter(np.pad(coverage, 4), SMOOTHING_PX)
    edge = ((smooth - 0.1) / 0.8).clip(0, 1)
    across, down = np.diff(edge, axis=1), np.diff(edge, axis=0)
    slope = np.hypot((across[1:] + across[:-1]) / 2, (down[:, 1:] + down[:, :-1]) / 2)
    length = float(slope.sum())
    return float((edge * (1 - edge)).sum()) / length if length else math.inf


def _distance(colour: Values, named: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(colour - np.array(named)))
