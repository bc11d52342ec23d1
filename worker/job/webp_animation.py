"""Encode a few small frames as an animated WebP that has at most a given number of bytes.

How many bytes frames take depends on what they show. So there are levels, each with fewer bytes
than the one before: lower quality, then fewer pixels and frames. An encoder goes down until the
result fits, and begins the next time one level above the last one that did.
"""

from __future__ import annotations

import subprocess
import threading
from dataclasses import dataclass
from typing import Final

import imageio_ffmpeg

from jobs.store.live.previews import MAX_PREVIEW_BYTES
from worker.interface import PreviewClip
from worker.job.pictures import ENCODE_TIMEOUT_S, fitted


@dataclass(frozen=True, slots=True)
class Level:
    """A way to encode frames: their longest side, libwebp's quality, and one of how many frames."""

    longest_px: int
    quality: int
    every_frame: int


LEVELS: Final = (
    Level(192, 75, 1),
    Level(192, 50, 1),
    Level(160, 30, 1),
    Level(128, 20, 1),
    Level(96, 20, 2),
    Level(64, 10, 2),
    Level(48, 5, 3),
    Level(32, 0, 4),
)
"""The last one fits whatever up to 40 frames show."""

FAR: Final = 4
"""With so many times too many bytes, the encoder skips a level."""


class WebpEncoder:
    """Encodes the previews of one job; `close` may be called from another thread."""

    def __init__(self, most_bytes: int = MAX_PREVIEW_BYTES) -> None:
        self._most_bytes = most_bytes
        self._level = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def encode(self, clip: PreviewClip) -> bytes | None:
        """Return an animated WebP of at most `most_bytes`; None if not even the last level fits.

        Raises:
            OSError, subprocess.SubprocessError: ffmpeg failed, took too long, or was closed.
        """
        index = max(0, self._level - 1)
        while index < len(LEVELS):
            data = self._encode(clip, LEVELS[index])
            if len(data) <= self._most_bytes:
                self._level = index
                return data
            # Far from the goal, the next level would not be enough either.
            is_far = len(data) > FAR * self._most_bytes and index + 2 < len(LEVELS)
            index += 2 if is_far else 1
        return None

    def close(self) -> None:
        """End an encoding that is under way, and refuse others."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()

    def _encode(self, clip: PreviewClip, level: Level) -> bytes:
        frames = clip.frames[:: level.every_frame]
        _, height, width, _ = frames.shape
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        command += ["-r", f"{clip.fps / level.every_frame:.6g}", "-i", "pipe:0"]
        if max(width, height) > level.longest_px:
            columns, rows = fitted(width, height, level.longest_px)
            command += ["-vf", f"scale={columns}:{rows}:flags=area"]
        command += ["-c:v", "libwebp_anim", "-quality", str(level.quality), "-loop", "0"]
        command += ["-threads", "1", "-pix_fmt", "yuv420p", "-f", "webp", "pipe:1"]
        process = self._start(command)
        try:
            data, said = process.communicate(frames.tobytes(), ENCODE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        finally:
            with self._lock:
                self._process = None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, data, said)
        if not data:
            raise OSError("ffmpeg has written an empty preview")
        return data

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_closed:
                raise OSError("the job has ended")
            pipe = subprocess.PIPE
            # In its own process group, as the encoder of the video.
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0
            )
            return self._process
