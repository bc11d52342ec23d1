"""Make videos whose frames carry their number in pixels, and read it from a canvas."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

WIDTH, HEIGHT, FRAMES, FPS = 832, 480, 81, 16
BITS = 7
BLOCK = 48  # px: a square a bit, white for 1, which survives any encoder

SHORT_GROUPS = ("-g", "8", "-bf", "0")
"""As viewing copies are made: a key frame every 8 frames, no frame predicted from a later one."""

READ_NUMBER = f"""
(canvas) => {{
  window.reader ??= new OffscreenCanvas({BITS}, 1).getContext("2d", {{ willReadFrequently: true }});
  for (let bit = 0; bit < {BITS}; bit += 1) {{
    const middle = bit * {BLOCK} + {BLOCK // 2};
    window.reader.drawImage(canvas, middle, {BLOCK // 2}, 1, 1, bit, 0, 1, 1);
  }}
  const pixels = window.reader.getImageData(0, 0, {BITS}, 1).data;
  return [...Array({BITS}).keys()].reduce(
    (number, bit) => number + (pixels[4 * bit] > 127 ? 2 ** bit : 0), 0,
  );
}}
"""
"""JavaScript: a function from a canvas of the video's size to the number that its frame carries."""


def write_numbered_video(
    path: Path,
    *,
    background: int,
    numbers: Sequence[int] = range(FRAMES),
    options: Sequence[str] = (),
) -> None:
    """Encode frames of those numbers with ffmpeg's H.264.

    Args:
        background: seeds a moving texture, so that two videos are not decoded in equal time.
    """
    coarse = np.random.default_rng(background).integers(40, 200, (HEIGHT // 16, WIDTH // 16))
    texture = coarse.astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    frames = []
    for number in numbers:
        frame = np.roll(texture, number * (1 + background % 5), axis=1)
        for bit in range(BITS):
            frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
        frames.append(frame.tobytes())
    source = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{WIDTH}x{HEIGHT}", "-r", str(FPS))
    target = ("-c:v", "libx264", "-crf", "30", "-pix_fmt", "yuv420p", "-movflags", "+faststart")
    subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-i", "-"),
            *(*target, *options, "-y", str(path)),
        ],
        input=b"".join(frames),
        check=True,
    )
