"""Name the judges of the command line and build those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quant.errors import StudyError
from quant.studies.evaluation.judges.ffmpeg_filters import SSIM, VMAF, XPSNR, FfmpegFilter
from quant.studies.evaluation.judges.interface import Judge, plug_in
from quant.studies.evaluation.judges.pixels import LatentSqnr, Psnr, TemporalFlickering
from quant.studies.evaluation.judges.st_lpips import StLpips
from quant.studies.evaluation.judges.vbench import PAPER_DIMENSIONS, VBenchDimension

VBENCH = "vbench"
BUILT_IN: dict[str, Callable[[], Judge]] = {
    "latent-sqnr": LatentSqnr,
    "psnr": Psnr,
    "ssim": lambda: _checked(SSIM),
    "vmaf": lambda: _checked(VMAF),
    "xpsnr": lambda: _checked(XPSNR),
    "st-lpips": StLpips,
    "temporal-flickering": TemporalFlickering,
}
DEFAULT = ("latent-sqnr", "psnr", "ssim", "vmaf", "xpsnr", "temporal-flickering")
"""Those that run wherever the toolkit does."""


def build_judges(
    names: Sequence[str],
    dimensions: Sequence[str] = (),
    vbench_python: Path | None = None,
    vbench_weights: Path | None = None,
    device: str = "cpu",
) -> list[Judge]:
    """Build judges, and check that each can run, before hours are spent on videos.

    Args:
        names: of `BUILT_IN`, "vbench", or "module:name".
        dimensions: VBench's; empty takes the paper's.

    Raises:
        StudyError: a judge is unknown, given twice, or lacks something, which is named.
    """
    judges: list[Judge] = []
    for name in names:
        if name == VBENCH:
            if vbench_python is None or vbench_weights is None:
                raise StudyError("the judge vbench needs --vbench-python and --vbench-weights")
            for each in dimensions or PAPER_DIMENSIONS:
                dimension = VBenchDimension(each, vbench_python, vbench_weights, device)
                dimension.check()
                judges.append(dimension)
        elif ":" in name:
            judges.append(plug_in(name))
        elif name in BUILT_IN:
            judges.append(BUILT_IN[name]())
        else:
            raise StudyError(
                f"there is no judge {name!r}: take {', '.join(BUILT_IN)}, {VBENCH}, or module:name"
            )
    found = [judge.name for judge in judges]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise StudyError(f"the judge {twice!r} is given twice: once is enough")
    return judges


def _checked(judge: FfmpegFilter) -> Judge:
    judge.check()
    return judge
