"""Offer the oracle as a judge of evaluations: `python -m quant evaluate --judge mini.judge:oracle`.

The toolkit does not know the miniature: it finds this judge by its name alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mini.world.oracle import verdicts
from mini.world.scenes import parse_caption


class Oracle:
    """The share of a caption's attributes that its video shows: 1 is all of them."""

    name, unit, higher_is_better, needs = "oracle", "", True, "video"

    def scores(self, videos: Sequence[Any], references: Sequence[Any]) -> Iterator[float]:
        """Yield the share of each video, whose prompt has to be a caption of this world."""
        for video in videos:
            found = verdicts(video.frames(), parse_caption(video.prompt))
            yield float(np.mean(list(found.values())))


def oracle() -> Oracle:
    """Return the judge."""
    return Oracle()
