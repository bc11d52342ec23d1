"""Judge by ST-LPIPS, a learned distance of pictures that tolerates small shifts.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022; PyPI's stlpips-pytorch
brings the weights (AlexNet's). That package imports torchvision, IPython and torchsummary, and its
AlexNet uses none of them. PyPI's torchvision breaks diffusers beside a torch for CPUs. So the three
are not asked for: empty modules stand in for them during the import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from quant.errors import StudyError
from quant.studies.evaluation.judges.interface import EachVideo, Needs
from quant.studies.evaluation.video_files import Frames, Video

_BATCH = 8


class StLpips(EachVideo):
    """The mean distance of frames: 0 is equal; above 0.55 the two show different things."""

    name, unit, higher_is_better = "st-lpips", "", False
    needs: Needs = "pair"

    def __init__(self) -> None:
        """Load the network.

        Raises:
            StudyError: the package is not installed, or its own needs are not met.
        """
        try:
            with _stand_ins():
                from stlpips_pytorch import stlpips  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise StudyError(
                f"the judge st-lpips cannot be loaded ({error}): install it with "
                "`pip install 'wan-hif8[judges]'`, or leave out --judge st-lpips"
            ) from error
        self._distance: Any = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)

    @torch.no_grad()
    def score(self, video: Video, reference: Video) -> float:
        """Return the mean distance of frames of the same time."""
        found, exact = video.frames(), reference.frames()
        total = 0.0
        for start in range(0, len(found), _BATCH):
            part = slice(start, start + _BATCH)
            total += float(self._distance(_tensor(found[part]), _tensor(exact[part])).sum())
        return total / len(found)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put empty modules in the place of those that are imported and not used."""
    added = []
    for name, part in (
        ("torchvision", "models"),
        ("IPython", "embed"),
        ("torchsummary", "summary"),
    ):
        if name not in sys.modules:
            module = sys.modules[name] = ModuleType(name)
            setattr(module, part, None)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _tensor(frames: Frames) -> torch.Tensor:
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
