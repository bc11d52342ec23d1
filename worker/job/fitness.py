"""Check that this worker can end a job: its scratch folder has room, and its ffmpeg encodes.

A worker that cannot would fail job after job, and faster than a healthy one beside it runs them. So
it is checked before it offers anything, and again after each fault of its own. What only the model
can get wrong is proven once, at the start (`worker/job/proof.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from jobs.errors import WorkerUnfit
from worker.interface import Frame
from worker.job.mp4_encoder import VideoFormat, encode_mp4

LEAST_ROOM_BYTES: Final = 4 * 1024 * 1024
"""The least room of a scratch folder, for a worker that has not made a larger video yet."""

TIMEOUT_S: Final = 30.0
"""How long ffmpeg may take for the few frames; usually it takes a tenth of a second."""

_FORMAT: Final = VideoFormat(width=64, height=64, num_frames=5, fps=8)
_CHUNK: Final = bytes(1024 * 1024)


def check_fitness(scratch: Path, largest_video_bytes: int) -> None:
    """Write as much as a job might into `scratch`, and encode a few frames there.

    Args:
        largest_video_bytes: of the videos made so far. ffmpeg may need twice its size at the end.

    Raises:
        WorkerUnfit: one of the two failed; the detail says which.
    """
    room_bytes = max(LEAST_ROOM_BYTES, 2 * largest_video_bytes)
    deadline = time.monotonic() + TIMEOUT_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise WorkerUnfit(f"ffmpeg has not encoded a few frames within {TIMEOUT_S:g} s.")

    try:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            _write(Path(folder) / "room", room_bytes)
            encode_mp4(_frames(), Path(folder) / "video.mp4", _FORMAT, "a check", {}, check)
    except OSError as error:
        raise refused_by_system(error) from error


def refused_by_system(error: OSError) -> WorkerUnfit:
    """Build the error for what the operating system refused; its text names no path."""
    return WorkerUnfit(
        f"The worker cannot use its files: {error.strerror or type(error).__name__}. Make room for "
        f"its scratch folder, or set TMPDIR to a folder that it may write."
    )


def _write(path: Path, size_bytes: int) -> None:
    """Write a file and remove it: only writing finds quotas and broken disks."""
    with path.open("wb") as file:
        for start in range(0, size_bytes, len(_CHUNK)):
            file.write(_CHUNK[: size_bytes - start])
    path.unlink()


def _frames() -> Iterator[Frame]:
    for index in range(_FORMAT.num_frames):
        yield np.full((_FORMAT.height, _FORMAT.width, 3), index * 50, np.uint8)
