"""Frames to an H.264 MP4, encoded while the frames come.

The file plays everywhere (yuv420p, BT.709 tagged) and starts before it is whole (faststart). Its
`comment` holds a JSON object with what made it: a video found on some disk can be traced to its job
without asking anyone. The prompt itself stays out of the file, only its hash goes in, since videos
travel further than prompts should.

ffmpeg comes from imageio-ffmpeg. Its own frame writer is not used: it waits for the encoder when a
job is cancelled, and resizes odd sizes silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from jobs.errors import GenerationFailed
from worker.interface import Frame

# Visually lossless for the eye at any size; the miniature's 17 frames take a few kilobytes.
CRF = 17
STALLED_S = 120.0
"""ffmpeg hangs when it has taken no byte of a frame for this long, or not finished the file."""

CHECK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """What the file will hold."""

    width: int
    height: int
    num_frames: int
    fps: int


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A finished file. `waited_s` is the time the caller of `encode_mp4` was held up by ffmpeg."""

    path: Path
    bytes: int
    sha256: str
    waited_s: float


def encode_mp4(
    frames: Iterable[Frame],
    path: Path,
    video: VideoFormat,
    title: str,
    facts: Mapping[str, object],
    check: Callable[[], None],
) -> EncodedVideo:
    """Write `frames` to `path` as they come and return what was written.

    `facts` become the file's comment, as JSON. ffmpeg runs beside the producer of the frames, so
    `waited_s` counts only what the producer's own time did not hide: pipe writes that blocked, and
    closing the file. `check` is called while ffmpeg is waited for; what it raises ends the work.

    Raises:
        GenerationFailed: ffmpeg ended early or badly, or the number or shape of frames is not
            `video`'s.
    """
    waited_s = 0.0
    count = 0
    with tempfile.TemporaryFile() as log, _ffmpeg(path, video, title, facts, log) as process:
        try:
            for frame in frames:
                _check_frame(frame, count, video)
                started = time.perf_counter()
                _write(process, frame, log, check)
                waited_s += time.perf_counter() - started
                count += 1
            if count != video.num_frames:
                raise GenerationFailed(f"{count} frames came; {video.num_frames} were announced.")
            started = time.perf_counter()
            _finish(process, log, check)
            waited_s += time.perf_counter() - started
        except BaseException:
            # Cancelled, timed out or failed: nothing wants the rest of this file.
            process.kill()
            raise
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return EncodedVideo(path, path.stat().st_size, digest, waited_s)


def _ffmpeg(
    path: Path, video: VideoFormat, title: str, facts: Mapping[str, object], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-hide_banner", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{video.width}x{video.height}"]
    command += ["-r", str(video.fps), "-i", "pipe:0", "-an"]
    # Untagged video is guessed to be BT.601 or BT.709 by its height; tagged, the colours stay what
    # they were.
    command += ["-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"]
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    command += ["-c:v", "libx264", "-preset", "medium", "-crf", str(CRF)]
    command += ["-movflags", "+faststart", "-metadata", f"title={title}"]
    command += ["-metadata", f"comment={json.dumps(facts, sort_keys=True)}", str(path)]
    # In a process group of its own: Ctrl-C in a terminal lets the worker finish its job, so it must
    # spare ffmpeg too. Unbuffered: a write returns when ffmpeg has taken the bytes, and closing has
    # nothing left to flush.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=log,
        bufsize=0,
        process_group=0,
    )
    assert process.stdin is not None, "ffmpeg was started without a pipe"
    # A write takes what fits into the pipe: a job can be stopped while ffmpeg is busy.
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _check_frame(frame: Frame, index: int, video: VideoFormat) -> None:
    if frame.shape != (video.height, video.width, 3) or index >= video.num_frames:
        raise GenerationFailed(
            f"Frame {index} has shape {frame.shape}; announced were {video.num_frames} frames of "
            f"{(video.height, video.width, 3)}."
        )


def _write(
    process: subprocess.Popen[bytes], frame: Frame, log: IO[bytes], check: Callable[[], None]
) -> None:
    assert process.stdin is not None, "ffmpeg was started without a pipe"
    left = frame.reshape(-1).data
    moved_at = time.monotonic()
    try:
        while left:
            written = process.stdin.write(left)
            if written:
                left, moved_at = left[written:], time.monotonic()
                continue
            # The pipe is full.
            check()
            if time.monotonic() - moved_at > STALLED_S:
                raise GenerationFailed(f"ffmpeg has taken no frames for {STALLED_S:.0f} s.")
            select.select((), (process.stdin,), (), CHECK_EVERY_S)
    except BrokenPipeError:
        # No frame can be taken any more, so the rest of the video need not be decoded.
        raise _ended_badly(process.wait(STALLED_S), log) from None


def _finish(process: subprocess.Popen[bytes], log: IO[bytes], check: Callable[[], None]) -> None:
    assert process.stdin is not None, "ffmpeg was started without a pipe"
    process.stdin.close()
    deadline = time.monotonic() + STALLED_S
    while time.monotonic() < deadline:
        try:
            code = process.wait(CHECK_EVERY_S)
        except subprocess.TimeoutExpired:
            check()
            continue
        if code != 0:
            raise _ended_badly(code, log)
        return
    raise GenerationFailed(
        f"ffmpeg has not finished the file within {STALLED_S:.0f} s of the last frame."
    )


def _ended_badly(code: int, log: IO[bytes]) -> GenerationFailed:
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()
    return GenerationFailed(
        f"ffmpeg ended with status {code}: {said[-1] if said else 'it said nothing'}."
    )
