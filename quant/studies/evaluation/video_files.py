"""Keep the videos of an evaluation: their latents, and their frames without any loss.

videos/<candidate>/<prompt>-<draw>.safetensors   latents, [1, C, F, H, W] float32
videos/<candidate>/<prompt>-<draw>.mp4           H.264 of RGB, lossless
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.errors import StudyError
from quant.weights.writer import to_bytes, write_whole

Frames = NDArray[np.uint8]

_PIXMAP = re.compile(rb"P6\n(\d+) (\d+)\n255\n")

FRAMES_PER_SECOND = 16
"""As Wan2.1 was trained; judges that see motion depend on it."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video on disk.

    Attributes:
        seed: of its noise.
        stem: its files without their ending.
    """

    prompt: str
    seed: int
    stem: Path

    @property
    def file(self) -> Path:
        """Return the file of the frames."""
        return self.stem.with_suffix(".mp4")

    @property
    def link(self) -> str:
        """Return the path of that file from the study's folder."""
        return "/".join(self.file.parts[-3:])

    def frames(self) -> Frames:
        """Read the frames, [F, H, W, 3].

        Raises:
            StudyError: the file is missing or damaged.
        """
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(self.file)]
        # Portable pixmaps, because each says how large it is.
        command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode or not done.stdout:
            raise _damaged(self.file)
        return _pixmaps(done.stdout)

    def latents(self) -> Tensor:
        """Read the latents, [1, C, F, H, W] float32.

        Raises:
            StudyError: the file is missing or damaged.
        """
        file = self.stem.with_suffix(".safetensors")
        try:
            return load_file(file)["latents"]
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(file) from error

    def write(self, latents: Tensor, frames: Frames) -> None:
        """Write both files, each whole or not at all.

        Raises:
            StudyError: a latent is not finite, or the disk cannot take a file.
        """
        if not latents.isfinite().all():
            raise StudyError(
                f"the video of {self.prompt!r}, seed {self.seed}, has NaN or infinity in its "
                "latents: check the weights with `python -m quant calibrate`, which names the layer"
            )
        try:
            self.stem.parent.mkdir(parents=True, exist_ok=True)
            data = to_bytes({"latents": latents.float().contiguous().cpu()}, {})
            write_whole(self.stem.with_suffix(".safetensors"), data)
            _encode(frames, self.file)
        except OSError as error:
            raise StudyError(
                f"cannot write {self.stem}: {error.strerror or error}; make room for it, and the "
                "same command goes on from here"
            ) from error

    def digest(self) -> str:
        """Return the SHA-256 of the latents' file, in hexadecimal."""
        return hashlib.sha256(self.stem.with_suffix(".safetensors").read_bytes()).hexdigest()


def _pixmaps(data: bytes) -> Frames:
    """Return pixmaps (PPM) that follow each other as [F, H, W, 3]."""
    found, place = [], 0
    while header := _PIXMAP.match(data, place):
        width, height = int(header[1]), int(header[2])
        place = header.end() + 3 * width * height
        pixels = np.frombuffer(data, np.uint8, 3 * width * height, header.end())
        found.append(pixels.reshape(height, width, 3))
    return np.stack(found)


def _encode(frames: Frames, file: Path) -> None:
    count, height, width, _ = frames.shape
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".video-") as folder:
        made = Path(folder) / file.name
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        command += ["-r", str(FRAMES_PER_SECOND), "-i", "-", "-frames:v", str(count)]
        # One thread, so that equal frames give equal bytes; a quantizer of 0 loses nothing.
        command += ["-c:v", "libx264rgb", "-qp", "0", "-pix_fmt", "rgb24", "-threads", "1"]
        command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", str(made)]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True, check=False)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason"]
            raise OSError(f"ffmpeg ended with {done.returncode}: {reason[0]}")
        os.replace(made, file)


def _damaged(file: Path) -> StudyError:
    return StudyError(
        f"{file} is missing or damaged: delete the study's folder and evaluate again, or put the "
        "file back"
    )
