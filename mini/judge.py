"""Offer the oracle and its graded measures as judges of evaluations.

`python -m quant evaluate --judge mini.judge:oracle`; beside it `mini.judge:sharpness`,
`mini.judge:colour_error` and `mini.judge:path_error`. The toolkit does not know the miniature: it
finds these judges by their names alone. A video's prompt has to be a caption of the miniature's
world; another one raises ValueError, which the toolkit reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mini.world import graded
from mini.world.oracle import Frames, verdicts
from mini.world.scenes import Scene, parse_caption


@dataclass(frozen=True, slots=True)
class CaptionJudge:
    """Compares each video with its caption alone, without BF16's video.

    Attributes:
        measure: gives a number to frames [F, H, W, 3] uint8 and the caption's scene.
    """

    name: str
    unit: str
    higher_is_better: bool
    measure: Callable[[Frames, Scene], float]
    needs: ClassVar[str] = "video"

    def scores(self, videos: Sequence[Any], references: Sequence[Any]) -> Iterator[float]:
        """Yield the number of each video."""
        del references
        for video in videos:
            yield self.measure(video.frames(), parse_caption(video.prompt))


def oracle() -> CaptionJudge:
    """Return the share of a caption's attributes that its video shows: 1 is all of them."""
    return CaptionJudge("oracle", "", True, _share_shown)


def sharpness() -> CaptionJudge:
    """Return the steepness of edges: 1 as rendered, less when blurred."""
    return CaptionJudge("sharpness", "", True, graded.sharpness)


def colour_error() -> CaptionJudge:
    """Return the mean distance of colours from the caption's, in levels of 8-bit RGB."""
    return CaptionJudge("colour-error", "levels", False, graded.colour_error)


def path_error() -> CaptionJudge:
    """Return the mean distance of things from the nearest path of the caption's motion."""
    return CaptionJudge("path-error", "px", False, graded.path_error)


def _share_shown(frames: Frames, scene: Scene) -> float:
    return float(np.mean(list(verdicts(frames, scene).values())))
