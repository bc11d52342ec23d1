"""Store comparisons whose pairs are ready, with real videos, as if workers had made them."""

import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from redis import Redis

from jobs.artifacts.store import ArtifactStore
from service.comparisons.media import pad_to_equal_length, remux
from service.comparisons.model import Arm, Comparison, HalfState, Pair, PairKind, ViewingCopy
from service.comparisons.store import ComparisonStore, new_pair_id
from tests.service.comparisons.samples import sample_comparison, sample_pairs

WIDTH, HEIGHT, FRAMES, FPS = 192, 112, 17, 8


def write_video(path: Path, source: str) -> None:
    """Encode FRAMES frames of one of ffmpeg's own sources."""
    size = f"size={WIDTH}x{HEIGHT}:rate={FPS}"
    encoder = ("-frames:v", f"{FRAMES}", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "8")
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = (ffmpeg, "-v", "error", "-f", "lavfi", "-i", f"{source}={size}", *encoder, "-y")
    subprocess.run((*command, str(path)), check=True)


def store_comparison(
    redis: Redis, artifacts: ArtifactStore, folder: Path, prompts: int, **changes: Any
) -> Comparison:
    """Store a comparison with a test pair for each prompt, and the other pairs of its plan."""
    comparison = sample_comparison(prompts=prompts, **changes)
    tests = sample_pairs(comparison)
    rating = comparison.rating
    kinds = [PairKind.GOLD] * rating.gold + [PairKind.IDENTICAL] * rating.identical
    kinds += [PairKind.TRAINING] * rating.training
    others = [
        Pair(id=new_pair_id(), number=number, kind=kind, prompt_id="1", seed=7, source=tests[0].id)
        for number, kind in enumerate(kinds, prompts + 1)
    ]
    files = [folder / f"{arm}.mp4" for arm in Arm]
    for file, source in zip(files, ("testsrc2", "testsrc"), strict=True):
        write_video(file.with_suffix(".source.mp4"), source)
        remux(file.with_suffix(".source.mp4"), file)
    length = pad_to_equal_length(files)
    shape = {"width": WIDTH, "height": HEIGHT, "fps": FPS, "num_frames": FRAMES}

    def made(pair: Pair) -> Pair:
        for arm, file in zip(Arm, files, strict=True):
            key = f"comparisons/{comparison.id}/{comparison.opaque('copy', pair.id, arm)}.mp4"
            artifacts.put(key, file, lambda: None)
            copy = ViewingCopy(key=key, bytes=length, **shape)
            done = {"copy_": copy, "state": HalfState.SUCCEEDED}
            pair = pair.with_half(arm, pair.half(arm).model_copy(update=done))
        return pair

    pairs = [made(pair) for pair in (*tests, *others)]
    ComparisonStore(redis).create(comparison, pairs)
    return comparison
