"""Judge by plain formulas: latent SQNR, PSNR and temporal flickering. None needs weights."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from quant.errors import StudyError
from quant.studies.evaluation.judges.interface import EachVideo, Needs
from quant.studies.evaluation.video_files import Video

MOST_DB = 100.0
"""What two equal videos get, whose ratio would be infinite."""

_THREADS = 8
"""Most of a score's time is another process', which decodes the frames."""


class LatentSqnr(EachVideo):
    """Signal to noise of the latents against those of BF16: the whole trajectory's deviation."""

    name, unit, higher_is_better = "latent-sqnr", "dB", True
    needs: Needs = "pair"
    threads = _THREADS

    def score(self, video: Video, reference: Video) -> float:
        """Return 10 log10(|reference|² / |video − reference|²)."""
        exact = reference.latents().double()
        noise = float((video.latents().double() - exact).square().sum())
        return _decibels(float(exact.square().sum()), noise)


class Psnr(EachVideo):
    """Peak signal to noise over all frames and channels of RGB, peak 255."""

    name, unit, higher_is_better = "psnr", "dB", True
    needs: Needs = "pair"
    threads = _THREADS

    def score(self, video: Video, reference: Video) -> float:
        """Return 10 log10(255² / mean squared difference)."""
        frames = video.frames()
        # Frame by frame, because float64 takes eight times the frames' bytes.
        squares = [
            np.square(ours.astype(np.float64) - theirs).sum()
            for ours, theirs in zip(frames, reference.frames(), strict=True)
        ]
        return _decibels(255.0**2, float(sum(squares)) / frames.size)


class TemporalFlickering(EachVideo):
    """How alike neighbouring frames are, by VBench's formula: 1 is a still picture.

    It falls with every motion, wanted or not: compare it between videos of the same prompts only.
    """

    name, unit, higher_is_better = "temporal-flickering", "", True
    needs: Needs = "video"
    threads = _THREADS

    def score(self, video: Video, reference: Video) -> float:
        """Return (255 − mean absolute difference of neighbouring frames) / 255."""
        frames = video.frames()
        if len(frames) < 2:
            raise StudyError("temporal flickering needs two frames: use more, or another judge")
        changes = [
            np.abs(after.astype(np.int16) - before).sum(dtype=np.int64)
            for before, after in pairwise(frames)
        ]
        return float((255.0 - sum(changes) / frames[1:].size) / 255.0)


def _decibels(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return 10 * math.log10(signal / noise) if signal > 0 else -MOST_DB
