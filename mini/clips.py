"""Write clips of the miniature's world: videos without loss, and their captions."""

from __future__ import annotations

import random
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from mini.architecture import FPS, HEIGHT_PX, WIDTH_PX
from mini.world.render import render_scene
from mini.world.scenes import Split, captions_of, parse_caption


def write_clips(out: Path, split: Split, count: int, seed: int) -> None:
    """Render `count` scenes with different captions into a new folder.

    It gets 00000.mp4 and so on, H.264 of RGB without loss, and captions.txt with a line for each.

    Raises:
        FileExistsError: the folder exists already.
    """
    out.mkdir()
    captions = captions_of(split, count, seed)
    rng = random.Random(f"{split} layouts {seed}")
    for number, caption in enumerate(captions):
        frames = render_scene(parse_caption(caption), rng).numpy()
        writer = imageio_ffmpeg.write_frames(
            str(out / f"{number:05d}.mp4"),
            (WIDTH_PX, HEIGHT_PX),
            fps=FPS,
            quality=None,
            codec="libx264rgb",
            pix_fmt_out="rgb24",
            output_params=["-qp", "0"],
        )
        writer.send(None)  # starts ffmpeg
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
    (out / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
