"""Judge by ffmpeg's own filters: SSIM, VMAF and XPSNR, of the ffmpeg that imageio-ffmpeg brings."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache

import imageio_ffmpeg

from quant.errors import StudyError
from quant.studies.evaluation.judges.interface import EachVideo, Needs
from quant.studies.evaluation.judges.pixels import MOST_DB
from quant.studies.evaluation.video_files import Video


@dataclass(frozen=True)
class FfmpegFilter(EachVideo):
    """A filter that compares two videos and prints one number.

    Attributes:
        filter: its name in ffmpeg.
        pixels: the format both are converted to.
        pattern: finds the number in what ffmpeg prints.
    """

    name: str
    unit: str
    filter: str
    pixels: str
    pattern: str
    higher_is_better: bool = True
    needs: Needs = "pair"

    def check(self) -> None:
        """Check that the filter is there.

        Raises:
            StudyError: this ffmpeg was built without it.
        """
        if self.filter not in _filters():
            raise StudyError(
                f"{imageio_ffmpeg.get_ffmpeg_exe()} has no filter {self.filter!r}: install "
                "imageio-ffmpeg 0.8.1 or newer and unset IMAGEIO_FFMPEG_EXE, or leave out "
                f"--judge {self.name}"
            )

    def score(self, video: Video, reference: Video) -> float:
        """Return the filter's number over all frames."""
        graph = (
            f"[0:v]format={self.pixels}[video];[1:v]format={self.pixels}[reference];"
            f"[video][reference]{self.filter}"
        )
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats"]
        command += ["-i", str(video.file), "-i", str(reference.file)]
        command += ["-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        found = re.findall(self.pattern, done.stderr)
        if done.returncode or not found:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise StudyError(
                f"ffmpeg's {self.filter} gave no number for {video.file}: {last}; leave out "
                f"--judge {self.name}"
            )
        return MOST_DB if found[-1] == "inf" else float(found[-1])


SSIM = FfmpegFilter("ssim", "", "ssim", "yuv444p", r"SSIM .*All:([\d.]+)")
VMAF = FfmpegFilter("vmaf", "", "libvmaf", "yuv420p", r"VMAF score: ([\d.]+)")
XPSNR = FfmpegFilter("xpsnr", "dB", "xpsnr", "yuv420p", r"XPSNR +y: +(inf|[\d.]+)")


@cache
def _filters() -> frozenset[str]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return frozenset(row[1] for row in rows if len(row) > 2 and "->" in row[2])
