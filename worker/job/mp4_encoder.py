"""Encode frames into an H.264 MP4 while they arrive.

The file plays everywhere (yuv420p, tagged BT.709), and playback can start before the whole file is
downloaded (faststart). Its `comment` is a JSON object with the job, the model and all settings, so
that a video found on any disk can be traced to its job. It holds the prompt's hash and not the
prompt, because videos are passed on to people who should not read the prompt.

ffmpeg comes from imageio-ffmpeg. Its own frame writer is not used: it waits for the encoder when a
job is cancelled, and resizes odd sizes silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from jobs.errors import GenerationFailed, WorkerUnfit
from worker.interface import Frame

# Visually lossless for the eye at any size; the miniature's 17 frames take a few kilobytes.
CRF = 17
STALLED_S = 120.0
"""ffmpeg counts as hanging when it has read no byte of a frame, or not finished the file, for this
long."""

CHECK_EVERY_S = 0.1

_FOLDER = re.compile(r"(?:/[^/\s:]+)+/")

_REMEDY = "Install imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264."


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """The size, number of frames and frame rate of a video."""

    width: int
    height: int
    num_frames: int
    fps: int


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A finished file. `waited_s` is how long the caller of `encode_mp4` waited for ffmpeg."""

    path: Path
    bytes: int
    sha256: str
    waited_s: float


def encode_mp4(
    frames: Iterable[Frame],
    path: Path,
    video: VideoFormat,
    title: str,
    metadata: Mapping[str, object],
    check: Callable[[], None],
) -> EncodedVideo:
    """Write `frames` to `path` as they arrive.

    ffmpeg runs in parallel with the producer of the frames. So `waited_s` of the result counts only
    blocked pipe writes and closing the file.

    Args:
        metadata: becomes the file's comment, as JSON.
        check: called while waiting for ffmpeg; what it raises ends the encoding.

    Raises:
        WorkerUnfit: ffmpeg cannot be started, ended early or with an error, or hangs.
        GenerationFailed: the number or shape of the frames is not `video`'s.
        OSError: files cannot be written or read.
    """
    waited_s = 0.0
    count = 0
    with tempfile.TemporaryFile() as log, _ffmpeg(path, video, title, metadata, log) as process:
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
            # Cancelled, timed out or failed: nobody needs the rest of this file.
            process.kill()
            raise
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return EncodedVideo(path, path.stat().st_size, digest, waited_s)


def _ffmpeg(
    path: Path, video: VideoFormat, title: str, metadata: Mapping[str, object], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [_find_ffmpeg(), "-y", "-hide_banner", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{video.width}x{video.height}"]
    command += ["-r", str(video.fps), "-i", "pipe:0", "-an"]
    # Players guess from the height whether untagged video is BT.601 or BT.709, which may change
    # its colours.
    command += ["-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"]
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    command += ["-c:v", "libx264", "-preset", "medium", "-crf", str(CRF)]
    command += ["-movflags", "+faststart", "-metadata", f"title={title}"]
    command += ["-metadata", f"comment={json.dumps(metadata, sort_keys=True)}", str(path)]
    # In its own process group: on Ctrl-C in a terminal the worker finishes its job, so the signal
    # must not reach ffmpeg either. Unbuffered: a write returns when the pipe has taken the bytes,
    # and closing has nothing left to flush.
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            bufsize=0,
            process_group=0,
        )
    except OSError as error:
        raise WorkerUnfit(f"ffmpeg does not start: {error.strerror}. {_REMEDY}") from error
    assert process.stdin is not None, "ffmpeg was started without a pipe"
    # A write takes what fits into the pipe, so that a job can be stopped while ffmpeg is busy.
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _find_ffmpeg() -> str:
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise WorkerUnfit(f"There is no ffmpeg on this machine. {_REMEDY}") from error


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
    remaining = frame.reshape(-1).data
    progressed_at = time.monotonic()
    try:
        while remaining:
            written = process.stdin.write(remaining)
            if written:
                remaining, progressed_at = remaining[written:], time.monotonic()
                continue
            # The pipe is full.
            check()
            if time.monotonic() - progressed_at > STALLED_S:
                raise WorkerUnfit(f"ffmpeg has taken no frames for {STALLED_S:g} s.")
            select.select((), (process.stdin,), (), CHECK_EVERY_S)
    except BrokenPipeError:
        # ffmpeg takes no more frames, so the rest of the video need not be decoded.
        raise _failure(_wait(process, check), log) from None


def _finish(process: subprocess.Popen[bytes], log: IO[bytes], check: Callable[[], None]) -> None:
    assert process.stdin is not None, "ffmpeg was started without a pipe"
    process.stdin.close()
    code = _wait(process, check)
    if code != 0:
        raise _failure(code, log)


def _wait(process: subprocess.Popen[bytes], check: Callable[[], None]) -> int:
    """Return ffmpeg's exit status once it has ended, after the last frame that it took."""
    deadline = time.monotonic() + STALLED_S
    while time.monotonic() < deadline:
        try:
            return process.wait(CHECK_EVERY_S)
        except subprocess.TimeoutExpired:
            check()
    raise WorkerUnfit(f"ffmpeg has not ended within {STALLED_S:g} s of the last frame.")


def _failure(code: int, log: IO[bytes]) -> WorkerUnfit:
    """Build the error: of checked frames in a configured size, ffmpeg can refuse none."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    # The last line names the file, whose folder is nobody's business but the operator's.
    said = _FOLDER.sub("", lines[-1]).rstrip(".") if lines else "it said nothing"
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    return WorkerUnfit(f"ffmpeg {ended}: {said}.")
