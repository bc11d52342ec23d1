"""Test encode-clips, and qat with the flow-matching loss, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from quant.studies.evaluation.video_files import Video
from quant.studies.output.study_folder import read_results
from quant.studies.qat.clips import open_clips
from tests.quant.studies.conftest import run


def write_videos(folder: Path, captions: list[str], seed: int) -> None:
    draw = np.random.default_rng(seed)
    for number in range(len(captions)):
        frames = draw.integers(0, 256, (5, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        Video("", 0, folder / f"{number:05d}").write(torch.zeros(1), frames)
    (folder / "captions.txt").write_text("\n".join(captions))


def encode(model: Path, videos: Path, out: Path) -> Any:
    return run(
        *("encode-clips", "--model", model, "--videos", videos, "--out", out),
        *("--text-tokens", "24"),
    )


@pytest.fixture(scope="module")
def clips(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    for name, seed in (("training", 0), ("held-out", 1)):
        videos = folder / f"{name}-videos"
        videos.mkdir()
        write_videos(videos, [f"{name} clip {letter}" for letter in "abcdefgh"], seed)
        result = encode(tiny_model, videos, folder / name)
        assert result.exit_code == 0, result.output
    return {name: folder / name for name in ("training", "held-out")}


def test_clips_are_what_the_vae_and_the_text_encoder_make(
    tiny_model: Path, clips: dict[str, Path]
) -> None:
    folder = open_clips(clips["training"])
    assert folder.info.shape == (16, 2, 4, 4)
    every = folder.clips()
    assert len(every) == 8
    assert not torch.equal(every[0].text, every[1].text)
    assert torch.equal(every[0].text[-1], torch.zeros(96)), "padded with zeros, as the service does"
    vae = AutoencoderKLWan.from_pretrained(tiny_model / "vae").float()
    frames = Video("", 0, clips["training"].parent / "training-videos" / "00003").frames()
    video = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mode()[0]  # the tiny model's mean is 0, its std 1
    assert torch.allclose(every[3].latents, expected, atol=1e-4)


def test_flow_matching_is_trained_and_measured_on_held_out_clips(
    tiny_model: Path, recorded: dict[str, Path], clips: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (
        *("qat", "--model", tiny_model, "--points", recorded["held-out"]),
        *("--training", recorded["calibration"], "--out", out, "--loss", "flow"),
        *("--methods", "int4-per-token", "--learning-rates", "3e-3", "--steps", "20"),
        *("--batches", "4", "--clips", clips["training"]),
    )
    same = run(*arguments, "--held-out-clips", clips["training"])
    assert "8 captions of" in same.output
    assert "train and test on different ones" in same.output
    result = run(*arguments, "--held-out-clips", clips["held-out"])
    assert result.exit_code == 0, result.output
    results = read_results(out, "qat")
    assert list(results["measures"]) == ["flow", "velocity"]
    assert results["measures"]["flow"] == {"prompts": 8, "values": 32}
    cell = results["cells"][0]
    before = results["ptq"]["int4-per-token"]["flow"]["mean"]
    assert cell["flow"]["mean"] < 0.98 * before, "an untrained model learns on any clips"
    control = results["controls"][0]
    assert control["flow"]["bf16"]["mean"] < 0.98 * results["ptq"]["bf16"]["flow"]["mean"]
    # The model moves away from the original, which the control shows as well.
    assert control["velocity"]["bf16"]["mean"] > 0.01
    assert "flow-matching loss: PTQ has" in results["findings"][0]
    assert (out / "figures" / "flow-int4-per-token.png").exists()


def test_unfit_clips_are_refused(
    tiny_model: Path, clips: dict[str, Path], recorded: dict[str, Path], tmp_path: Path
) -> None:
    captions = [f"clip {letter}" for letter in "abcdefgh"]
    videos = tmp_path / "videos"
    videos.mkdir()
    write_videos(videos, captions, 0)
    (videos / "captions.txt").write_text("\n".join([*captions, "one more"]))
    more = encode(tiny_model, videos, tmp_path / "out")
    assert "8 videos (*.mp4) and captions.txt 9 captions" in more.output
    (videos / "captions.txt").write_text("\n".join(captions))
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    Video("", 0, videos / "00002").write(torch.zeros(1), frames)
    short = encode(tiny_model, videos, tmp_path / "out")
    assert "has 4 frames of 32x32: the number of frames must be 4k + 1" in short.output
    Video("", 0, videos / "00002").write(torch.zeros(1), np.zeros((1, 32, 32, 3), np.uint8))
    other = encode(tiny_model, videos, tmp_path / "out")
    assert "all videos must have one size and length" in other.output
    again = encode(tiny_model, videos, clips["training"])
    assert "exists already" in again.output
    assert not (tmp_path / "out").exists()

    moved = tmp_path / "moved"
    moved.mkdir()
    info = json.loads((clips["held-out"] / "clips.json").read_text())
    (moved / "clips.json").write_text(json.dumps(info | {"model": "sha256-full-v2:0"}))
    for held_out, words in (
        (moved, "was made with another model"),
        (recorded["held-out"], "is not a folder of clips"),
    ):
        result = run(
            *("qat", "--model", tiny_model, "--points", recorded["held-out"]),
            *("--training", recorded["calibration"], "--out", tmp_path / "out"),
            *("--loss", "flow", "--methods", "hif8", "--clips", clips["training"]),
            *("--held-out-clips", held_out),
        )
        assert result.exit_code == 1
        assert words in result.output
