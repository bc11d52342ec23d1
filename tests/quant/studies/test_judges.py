"""Test the judges against independent references: numpy, ffmpeg's own filters, a stand-in package.

Every judge is run on videos that were really written and read back.
"""

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from mini.judge import CaptionJudge
from mini.world.render import render_scene
from mini.world.scenes import Split, captions_of, parse_caption
from quant.errors import StudyError
from quant.studies.evaluation.judges.catalog import build_judges
from quant.studies.evaluation.judges.ffmpeg_filters import SSIM, VMAF, XPSNR
from quant.studies.evaluation.judges.interface import plug_in
from quant.studies.evaluation.judges.pixels import LatentSqnr, Psnr, TemporalFlickering
from quant.studies.evaluation.judges.vbench import PAPER_DIMENSIONS
from quant.studies.evaluation.video_files import Video

RNG = np.random.default_rng(3)


def smooth(seed: int) -> np.ndarray:
    """Return [5, 64, 96, 3]: waves that move, so that every judge has something to see."""
    t, y, x = np.meshgrid(np.arange(5), np.arange(64), np.arange(96), indexing="ij")
    waves = [np.sin((x + 3 * t) / (6 + c) + y / 9 + seed + c) for c in range(3)]
    return np.rint(127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def written(folder: Path, name: str, frames: np.ndarray, latents: torch.Tensor) -> Video:
    video = Video("a prompt", 0, folder / name)
    video.write(latents, frames)
    return video


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Video, Video]:
    folder = tmp_path_factory.mktemp("videos")
    exact, latents = smooth(0), torch.randn(1, 4, 2, 8, 12)
    noisy = np.clip(exact + RNG.normal(0, 6, exact.shape), 0, 255).astype(np.uint8)
    return (
        written(folder, "noisy", noisy, latents * 1.01),
        written(folder, "exact", exact, latents),
    )


def test_no_more_videos_are_judged_at_once_than_there_are_cores(
    pair: tuple[Video, Video], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    class Watched(Psnr):
        def score(self, video: Video, reference: Video) -> float:
            threads.add(threading.get_ident())
            return super().score(video, reference)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert len(set(Watched().scores([pair[0]] * 4, [pair[1]] * 4))) == 1
    assert len(threads) == 1


def test_a_video_comes_back_as_it_was(tmp_path: Path) -> None:
    frames = RNG.integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    latents = torch.randn(1, 4, 1, 4, 6)
    first = written(tmp_path, "a", frames, latents)
    np.testing.assert_array_equal(first.frames(), frames)
    assert torch.equal(first.latents(), latents)
    again = written(tmp_path, "b", frames, latents)
    assert first.file.read_bytes() == again.file.read_bytes()
    assert (
        sorted(each.suffix for each in tmp_path.iterdir())
        == [".mp4", ".mp4"] + [".safetensors"] * 2
    )
    first.file.write_bytes(b"nothing")
    with pytest.raises(StudyError, match="missing or damaged"):
        first.frames()
    with pytest.raises(StudyError, match="NaN or infinity"):
        first.write(latents * float("nan"), frames)


def test_psnr_is_ffmpegs(pair: tuple[Video, Video]) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", pair[0].file]
    command += ["-i", pair[1].file, "-lavfi", "[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]psnr"]
    command += ["-f", "null", "-"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    expected = float(re.findall(r"average:([\d.]+)", shown)[-1])
    assert Psnr().score(*pair) == pytest.approx(expected, abs=1e-3)
    assert Psnr().score(pair[1], pair[1]) == 100


def test_latent_sqnr_of_a_hundredth_is_forty_decibels(pair: tuple[Video, Video]) -> None:
    assert LatentSqnr().score(*pair) == pytest.approx(40, abs=1e-3)
    assert LatentSqnr().score(pair[1], pair[1]) == 100


def test_ssim_is_that_of_windows_of_eight(pair: tuple[Video, Video]) -> None:
    """Compute ffmpeg's variant of Wang's formula: 8x8 windows, four pixels apart, unweighted."""
    raw = []
    for video in pair:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", video.file]
        command += ["-pix_fmt", "yuv444p", "-f", "rawvideo", "-"]
        data = subprocess.run(command, capture_output=True, check=True).stdout
        raw.append(np.frombuffer(data, np.uint8).reshape(5, 3, 64, 96).astype(np.float64))
    windows = [
        np.lib.stride_tricks.sliding_window_view(each, (8, 8), (2, 3))[:, :, ::4, ::4]
        for each in raw
    ]
    (a, b), dims, c1, c2 = windows, (-2, -1), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = a.mean(dims), b.mean(dims)
    spread = a.var(dims, ddof=1) + b.var(dims, ddof=1)
    both = ((a - mean_a[..., None, None]) * (b - mean_b[..., None, None])).sum(dims) / 63
    values = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    values /= (mean_a**2 + mean_b**2 + c1) * (spread + c2)
    assert SSIM.score(*pair) == pytest.approx(values.mean(), abs=2e-3)
    assert SSIM.score(pair[1], pair[1]) == 1


def test_xpsnr_and_vmaf_tell_noise_from_none(pair: tuple[Video, Video]) -> None:
    XPSNR.check()
    assert 25 < XPSNR.score(*pair) < 45
    assert XPSNR.score(pair[1], pair[1]) == 100
    assert VMAF.score(*pair) < VMAF.score(pair[1], pair[1])
    assert VMAF.score(pair[1], pair[1]) > 90


def test_st_lpips_grows_with_noise_and_is_zero_without(pair: tuple[Video, Video]) -> None:
    (judge,) = build_judges(["st-lpips"])
    assert not judge.higher_is_better
    same, noisy = (next(judge.scores([each], [pair[1]])) for each in (pair[1], pair[0]))
    assert same == 0
    assert 0.001 < noisy < 0.5
    assert "torchvision" not in sys.modules  # what stood in for it is gone


def test_flickering_is_what_a_hand_computes(tmp_path: Path) -> None:
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    frames[1] = 51  # from 0 to 51, then half of the picture back to 0: (51 + 25.5) / 2 = 38.25
    frames[2, :8] = 51
    video = written(tmp_path, "a", frames, torch.zeros(1, 1, 1, 1, 1))
    assert TemporalFlickering().score(video, video) == pytest.approx((255 - 38.25) / 255, abs=1e-9)
    still = written(tmp_path, "b", frames[:1], torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(StudyError, match="two frames"):
        TemporalFlickering().score(still, still)


def test_the_miniatures_judges_are_plug_ins(tmp_path: Path) -> None:
    caption = captions_of(Split.EVALUATION, 1)[0]
    frames = render_scene(parse_caption(caption), random.Random(0)).numpy()
    video, other = Video(caption, 0, tmp_path / "a"), Video("a cat", 0, tmp_path / "b")
    for each in (video, other):
        each.write(torch.zeros(1, 1, 1, 1, 1), frames)
    exact = {"oracle": 1.0, "sharpness": 1.0, "colour_error": 0.0, "path_error": 0.0}
    for name, expected in exact.items():
        judge = plug_in(f"mini.judge:{name}")
        assert isinstance(judge, CaptionJudge)
        assert judge.name == name.replace("_", "-")
        assert judge.higher_is_better == (expected == 1)
        assert list(judge.scores([video], [video])) == [pytest.approx(expected, abs=0.05)]
        with pytest.raises(ValueError, match="not a caption"):
            list(judge.scores([other], [other]))


def test_what_is_no_judge_is_refused() -> None:
    for wrong in ("mini.judge:nobody", "no_such_module:judge", "mini.judge:np", "mini.judge"):
        with pytest.raises(StudyError, match="no judge"):
            plug_in(wrong)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    with pytest.raises(StudyError, match=r"pip install 'wan-hif8\[judges\]'"):
        build_judges(["st-lpips"])
    with pytest.raises(StudyError, match="no judge 'lpips'"):
        build_judges(["lpips"])
    with pytest.raises(StudyError, match="given twice"):
        build_judges(["psnr", "psnr"])


def test_vbench_names_what_is_missing_and_is_asked_for_all_videos_at_once(
    tmp_path: Path, pair: tuple[Video, Video], monkeypatch: pytest.MonkeyPatch
) -> None:
    python, weights = Path(sys.executable), tmp_path / "weights"
    for name in PAPER_DIMENSIONS:
        with pytest.raises(StudyError, match=f"{name} needs .* nothing is downloaded"):
            build_judges(["vbench"], [name], python, weights)
    with pytest.raises(StudyError, match="does not import vbench"):
        build_judges(["vbench"], ["temporal_flickering"], python, weights)
    with pytest.raises(StudyError, match="not one of those"):
        build_judges(["vbench"], ["color"], python, weights)
    with pytest.raises(StudyError, match="--vbench-python"):
        build_judges(["vbench"])
    package = tmp_path / "packages" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text(
        "import os\n"
        "def init_submodules(names, local):\n"
        "    assert local\n"
        "    return {name: os.environ['VBENCH_CACHE_DIR'] for name in names}\n"
    )
    (package / "temporal_flickering.py").write_text(
        "import json\n"
        "def compute_temporal_flickering(listing, device, parts):\n"
        "    rows = json.load(open(listing))\n"
        "    assert parts.endswith('weights') and device == 'cpu'\n"
        "    assert rows[0]['prompt_en'] == 'a prompt'\n"
        "    paths = [path for row in rows for path in row['video_list']]\n"
        "    rows = [{'video_path': p, 'video_results': len(p)} for p in reversed(paths)]\n"
        "    return 0, rows\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    (judge,) = build_judges(["vbench"], ["temporal_flickering"], python, weights)
    assert judge.name == "vbench-temporal-flickering"
    expected = [float(len(str(each.file.resolve()))) for each in pair]
    assert list(judge.scores(pair, pair)) == expected
    assert list(judge.scores([], [])) == []
