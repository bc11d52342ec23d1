"""Copy, damage, pad and measure videos with ffmpeg.

What leaves here tells nothing of the job that made a video: no metadata, no encoder's notes, and
files of equal length. The pixels of a copy are those of the video, because nothing is encoded again
but for gold pairs.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import imageio_ffmpeg

from service.comparisons.model import PixelMeasures, ViewingCopy

TIMEOUT_S: Final = 120.0
"""How long ffmpeg may take for a video; 81 frames of 832x480 take some seconds."""

_SMALLEST_ATOM = 8
_NO_NOTES = [
    *("-map_metadata", "-1", "-map_chapters", "-1"),
    # x264 writes its settings into the stream, as a unit of type 6 (SEI).
    *("-bsf:v", "filter_units=remove_types=6", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
    *("-movflags", "+faststart+write_colr"),
]
_ENCODER = ["-c:v", "libx264", "-preset", "medium", "-crf", "17", "-threads", "4"]
_COLOURS = [
    *("-colorspace", "bt709", "-color_primaries", "bt709"),
    *("-color_trc", "bt709", "-color_range", "tv"),
]
_PSNR = re.compile(r"PSNR .*\baverage:(inf|[0-9.]+)")
_SSIM = re.compile(r"SSIM .*\bAll:([0-9.]+)")
_FOLDER = re.compile(r"(?:/[^/\s:]+)+/")


class FfmpegAway(Exception):
    """ffmpeg is missing, was killed or hangs: not the video's fault, so it is tried again."""


class FfmpegRefused(Exception):
    """ffmpeg cannot do this with this video; the message is its own, without paths."""


def remux(source: Path, target: Path) -> None:
    """Copy the video stream of an MP4, and nothing else of it. Raises FfmpegAway, FfmpegRefused."""
    _run("-i", str(source), "-map", "0:v:0", "-c", "copy", *_NO_NOTES, str(target))


def encode_again(source: Path, target: Path, video: ViewingCopy, *, damaged: bool) -> None:
    """Encode a video again, as it is or visibly damaged, with equal settings for both.

    The damage is blocks of 8 px, blur, noise, and two of three frames that stand still; size and
    number of frames stay. It follows from the video alone.

    Args:
        video: what is known of the source.
    """
    size = f"{video.width}:{video.height}"
    small = f"{max(2, video.width // 8)}:{max(2, video.height // 8)}"
    damage = [
        f"scale={small}:flags=area,scale={size}:flags=neighbor",
        f"gblur=sigma={max(1.0, video.width / 200):.2f},noise=all_seed=1:alls=24:allf=t",
        # Without its second and third frame, each third is shown for three.
        rf"select=not(mod(n\,3)),tpad=stop=3:stop_mode=clone,fps={video.fps}",
    ]
    filters = [*(damage if damaged else ()), "format=yuv420p"]
    encoded = target.with_suffix(".encoded.mp4")
    _run(
        *("-i", str(source), "-map", "0:v:0", "-vf", ",".join(filters)),
        *("-frames:v", str(video.num_frames), *_COLOURS, *_ENCODER, str(encoded)),
    )
    remux(encoded, target)  # a new encoding carries notes that only a second pass removes


def measure(reference: Path, candidate: Path) -> PixelMeasures:
    """Measure how alike two videos of one size and length are. Raises FfmpegAway, FfmpegRefused."""
    both = "[0:v]split[a][b];[1:v]split[c][d];[c][a]psnr[p];[d][b]ssim[s]"
    said = _run(
        *("-i", str(reference), "-i", str(candidate), "-lavfi", both),
        *("-map", "[p]", "-map", "[s]", "-f", "null", "-"),
        loglevel="info",
    )
    psnr, ssim = _PSNR.search(said), _SSIM.search(said)
    if psnr is None or ssim is None:
        raise FfmpegRefused("ffmpeg said no PSNR or no SSIM")
    decibels = None if psnr[1] == "inf" else float(psnr[1])
    return PixelMeasures(psnr_db=decibels, ssim=float(ssim[1]))


def pad_to_equal_length(files: Sequence[Path]) -> int:
    """Append an MP4 atom `free`, which players skip, to each file; return their length in bytes."""
    length = max(file.stat().st_size for file in files) + _SMALLEST_ATOM
    for file in files:
        room = length - file.stat().st_size
        with file.open("ab") as out:
            out.write(room.to_bytes(4, "big") + b"free" + bytes(room - _SMALLEST_ATOM))
    return length


def _run(*arguments: str, loglevel: str = "error") -> str:
    """Run ffmpeg and return what it said."""
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        done = subprocess.run(
            [program, "-y", "-nostdin", "-hide_banner", "-loglevel", loglevel, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, RuntimeError) as error:
        raise FfmpegAway(
            "There is no ffmpeg on the service's machine; install imageio-ffmpeg again, or set "
            "IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FfmpegAway(f"ffmpeg has not ended within {TIMEOUT_S:g} s.") from error
    said = done.stderr.decode(errors="replace")
    if done.returncode < 0:
        raise FfmpegAway(f"ffmpeg was killed by signal {-done.returncode}.")
    if done.returncode:
        lines = said.strip().splitlines()
        raise FfmpegRefused(_FOLDER.sub("", lines[-1]) if lines else "ffmpeg said nothing")
    return said
