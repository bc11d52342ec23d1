"""Measure what a thumbnail and a spritesheet add to the encoding of a video.

`python -m benchmarks.speed.pictures`

The baseline is the MP4 alone, of the same frames. They are a scene as the miniature draws it, and
noise in full size, which is the hardest input to encode. All frames are there at the start, so part
of the scaling happens while ffmpeg is busy. A job waits for frames instead, and the scaling delays
each. So the pictures' own seconds, scaling and WebP, are listed as well: they are the most that a
job can take longer.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import report
from mini.world.render import render_scene
from mini.world.scenes import EXAMPLE
from worker.interface import Frame
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.job.pictures import PictureCollector

SEED = 7
MINIATURE = VideoFormat(96, 96, 17, 8)
FULL_SIZE = VideoFormat(832, 480, 81, 16)


class TimedCollector(PictureCollector):
    """A collector that adds up the seconds it takes itself."""

    def __init__(self, video: VideoFormat) -> None:
        super().__init__(video)
        self.scaling_s = 0.0

    def _add(self, index: int, frame: Frame) -> None:
        started = time.perf_counter()
        super()._add(index, frame)
        self.scaling_s += time.perf_counter() - started


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Encodings of each kind that count.")] = 5,
) -> None:
    """Measure both videos, with and without pictures."""
    rng = np.random.default_rng(SEED)
    scene: list[Frame] = list(render_scene(EXAMPLE, random.Random(SEED)).numpy())
    shape = (FULL_SIZE.height, FULL_SIZE.width, 3)
    noise = [rng.integers(0, 256, shape, np.uint8) for _ in range(FULL_SIZE.num_frames)]
    rows = report.log_rows(
        row
        for name, video, frames in (
            ("miniature", MINIATURE, scene),
            ("832x480 noise", FULL_SIZE, noise),
        )
        for row in _measure(name, video, frames, rounds)
    )
    settings = {
        "rounds": rounds,
        "statistic": "median",
        "cores": len(os.sched_getaffinity(0)),
        "miniature": "96x96, 17 frames",
        "noise": "832x480, 81 frames",
    }
    document = report.result("pictures", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def _measure(
    name: str, video: VideoFormat, frames: Sequence[Frame], rounds: int
) -> Iterator[report.Row]:
    alone, both, scaling, webp = list[float](), list[float](), list[float](), list[float]()
    for number in range(rounds + 1):
        without_s = _encode(video, frames, None)[0]
        collector = TimedCollector(video)
        with_s, webp_s = _encode(video, frames, collector)
        if number:  # the first round is the warm-up
            alone.append(without_s)
            both.append(with_s)
            scaling.append(collector.scaling_s)
            webp.append(webp_s)
    yield report.Row(f"{name}, MP4 and pictures", _median(both), "s", _median(alone))
    yield report.Row(f"{name}, scaling alone", _median(scaling), "s")
    yield report.Row(f"{name}, WebP alone", _median(webp), "s")


def _encode(
    video: VideoFormat, frames: Sequence[Frame], collector: PictureCollector | None
) -> tuple[float, float]:
    """Encode the frames; return the seconds in all, and those of the WebP files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        started = time.perf_counter()
        source = frames if collector is None else collector.watch(frames)
        encode_mp4(source, path / "video.mp4", video, "benchmark", {}, lambda: None)
        encoded = time.perf_counter()
        if collector is not None:
            assert collector.encode(path) is not None, "the log says why there are no pictures"
        ended = time.perf_counter()
    return ended - started, ended - encoded


def _median(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds), 4)


if __name__ == "__main__":
    typer.run(main)
