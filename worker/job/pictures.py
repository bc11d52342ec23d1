"""Make a thumbnail and a spritesheet of a video while its frames pass by.

Each needed frame is scaled down as it passes, so only small pictures are held in memory. Afterwards
ffmpeg encodes both as WebP. A video without pictures is still a video: what goes wrong here is
logged, and the job goes on.
"""

from __future__ import annotations

import hashlib
import logging
import math
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from worker.interface import Frame
from worker.job.mp4_encoder import VideoFormat

logger = logging.getLogger(__name__)

THUMBNAIL_PX: Final = 320
"""The longest side of a thumbnail."""

SHEET_FRAME_PX: Final = 160
"""The longest side of a frame in a spritesheet."""

SHEET_SIDE: Final = 5
"""The most rows and columns of a spritesheet."""

QUALITY: Final = 80
"""libwebp's quality, 0 to 100."""

ENCODE_TIMEOUT_S: Final = 10.0
"""How long ffmpeg may take for one picture; usually it takes less than a tenth of a second."""


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A finished picture."""

    path: Path
    bytes: int
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SheetLayout:
    """The grid of a spritesheet; `frames` are the numbers of its frames, row by row."""

    columns: int
    rows: int
    frame_width: int
    frame_height: int
    frames: tuple[int, ...]

    @classmethod
    def of(cls, video: VideoFormat) -> SheetLayout:
        """Lay out the frames of a video: the first, the last, and evenly spaced ones between."""
        count = min(video.num_frames, SHEET_SIDE**2)
        columns = math.ceil(math.sqrt(count))
        last = video.num_frames - 1
        frames = tuple(round(index * last / max(1, count - 1)) for index in range(count))
        width, height = fitted(video.width, video.height, SHEET_FRAME_PX)
        return cls(columns, math.ceil(count / columns), width, height, frames)


@dataclass(frozen=True, slots=True)
class EncodedPictures:
    """The pictures of one video."""

    thumbnail: EncodedPicture
    spritesheet: EncodedPicture
    layout: SheetLayout


class PictureCollector:
    """Scales down the frames that the pictures of one video show."""

    def __init__(self, video: VideoFormat, timeout_s: float = ENCODE_TIMEOUT_S) -> None:
        """Prepare the pictures.

        Args:
            timeout_s: how long ffmpeg may take for each.
        """
        self._timeout_s = timeout_s
        self._layout = SheetLayout.of(video)
        # The middle: many videos begin and end with something else than what they are about.
        self._middle = video.num_frames // 2
        self._thumbnail_scaler = AreaScaler(video, fitted(video.width, video.height, THUMBNAIL_PX))
        self._thumbnail: Frame | None = None
        size = self._layout.frame_width, self._layout.frame_height
        self._sheet_scaler = AreaScaler(video, size)
        height, width = self._layout.rows * size[1], self._layout.columns * size[0]
        # With alpha: cells without a frame stay transparent, as black ones would look like frames.
        self._sheet: NDArray[np.uint8] = np.zeros((height, width, 4), np.uint8)
        self._cells = {frame: cell for cell, frame in enumerate(self._layout.frames)}

    def watch(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield `frames`; each is looked at after whoever consumes them has accepted it."""
        for index, frame in enumerate(frames):
            yield frame
            self._add(index, frame)

    def encode(self, folder: Path) -> EncodedPictures | None:
        """Encode the pictures into `folder`, after the last frame; None if that fails."""
        assert self._thumbnail is not None, "the frames have not been watched"
        try:
            thumbnail = _encode_webp(self._thumbnail, folder / "thumbnail.webp", self._timeout_s)
            spritesheet = _encode_webp(self._sheet, folder / "spritesheet.webp", self._timeout_s)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("the video has no pictures: %s", reason(error))
            return None
        return EncodedPictures(thumbnail, spritesheet, self._layout)

    def _add(self, index: int, frame: Frame) -> None:
        if index == self._middle:
            self._thumbnail = self._thumbnail_scaler.scale(frame)
        cell = self._cells.get(index)
        if cell is not None:
            row, column = divmod(cell, self._layout.columns)
            height, width = self._layout.frame_height, self._layout.frame_width
            place = self._sheet[row * height :, column * width :][:height, :width]
            place[..., :3] = self._sheet_scaler.scale(frame)
            place[..., 3] = 255


class AreaScaler:
    """Scales frames of one size down: a pixel becomes the mean of those that it stands for.

    It adds whole pixels, a few rows at a time. A matrix product would weigh parts of pixels, too,
    but its threads would wait for each other while ffmpeg uses all cores.
    """

    def __init__(self, video: VideoFormat, size: tuple[int, int]) -> None:
        """Prepare the areas.

        Args:
            size: width and height of the result; no more than the video's.
        """
        self._is_same = size == (video.width, video.height)
        columns, self._rows = _edges(video.width, size[0]), _edges(video.height, size[1])
        self._column_starts = columns[:-1]
        self._counts = np.diff(self._rows)[:, None, None] * np.diff(columns)[:, None]

    def scale(self, frame: Frame) -> Frame:
        """Return the smaller frame, or a copy if the size stays: the frame may be reused."""
        if self._is_same:
            return frame.copy()
        bands = [
            frame[start:end].sum(0, dtype=np.uint32) for start, end in pairwise(self._rows.tolist())
        ]
        sums = np.add.reduceat(np.stack(bands), self._column_starts, axis=1)
        means: Frame = ((sums + self._counts // 2) // self._counts).astype(np.uint8)
        return means


def fitted(width: int, height: int, longest_px: int) -> tuple[int, int]:
    """Return the size of a picture of a video whose longest side has at most so many pixels.

    Both sides are even, because WebP stores colours for two by two pixels, which then never belong
    to two frames of a spritesheet. A video that is smaller keeps its size.
    """
    share = min(1.0, longest_px / max(width, height))
    if share == 1.0:
        return width, height
    return max(2, 2 * round(width * share / 2)), max(2, 2 * round(height * share / 2))


def _edges(source: int, target: int) -> NDArray[np.int64]:
    """Divide `source` pixels into `target` runs of nearly equal length; return where they begin.

    The last edge is the end.
    """
    edges: NDArray[np.int64] = np.rint(np.arange(target + 1) * (source / target)).astype(np.int64)
    return edges


def _encode_webp(picture: NDArray[np.uint8], path: Path, timeout_s: float) -> EncodedPicture:
    """Encode one picture, with or without alpha; raises OSError or SubprocessError."""
    height, width, channels = picture.shape
    size, pixels = f"{width}x{height}", "rgb24" if channels == 3 else "rgba"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-hide_banner", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-i", "pipe:0"]
    # libwebp itself converts RGB to YUV as WebP wants it.
    command += ["-frames:v", "1", "-c:v", "libwebp", "-pix_fmt", "bgra"]
    command += ["-quality", str(QUALITY), "-f", "webp", str(path)]
    # In its own process group, as the encoder of the video.
    subprocess.run(
        command,
        input=picture.tobytes(),
        capture_output=True,
        check=True,
        timeout=timeout_s,
        process_group=0,
    )
    data = path.read_bytes()
    if not data:
        raise OSError(f"ffmpeg left {path.name} empty")
    return EncodedPicture(path, len(data), hashlib.sha256(data).hexdigest(), width, height)


def reason(error: OSError | subprocess.SubprocessError) -> str:
    """Say in a few words why ffmpeg made no picture."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = lines[0] if lines else "it said nothing"
        return f"ffmpeg ended with status {error.returncode}: {said}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"ffmpeg has not finished a picture within {error.timeout:g} s"
    return str(error)
