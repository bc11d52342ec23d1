"""Test the map from latents to pictures: that it is fitted, kept, and refused for another VAE."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from quant.calibration.preview_map import (
    MIN_VIDEOS,
    PreviewMap,
    fit_preview_map,
    load_preview_map,
    save_preview_map,
    shrunk,
)
from quant.errors import PreviewMapError
from quant.weights.fingerprint import model_fingerprint, vae_fingerprint

MODEL = Path(__file__).resolve().parents[3] / "models" / "wan-mini"


def smooth_latents(count: int) -> list[Tensor]:
    """Small random latents that change slowly: three latent frames of 32x32 px."""
    random = torch.Generator().manual_seed(0)
    return [
        functional.interpolate(torch.randn(1, 16, 2, 2, 2, generator=random), (3, 4, 4))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(MODEL / "vae").eval()


@pytest.fixture(scope="module")
def fitted(vae: AutoencoderKLWan) -> PreviewMap:
    return fit_preview_map(vae, smooth_latents(18), vae_fingerprint(MODEL))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the miniature that a test may change."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_a_map_explains_videos_that_it_was_not_fitted_on(fitted: PreviewMap) -> None:
    assert (fitted.videos, fitted.pixels) == (12, 2)
    assert tuple(fitted.weight.shape) == (16, 12)
    assert 0.1 < fitted.r2 < 1, "random latents are like no video, and less linear"
    assert 0 < fitted.rms_error < 60


def test_a_map_finds_a_linear_relation_again() -> None:
    """Pictures come out where the map puts them: rows, columns and colours in their order."""
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.rand(4, 12, generator=random) / 8, torch.rand(12, generator=random) / 8
    latents = torch.rand(4, 3, 2, 5, generator=random)
    pictures = PreviewMap("vae", 2, weight, bias, 1, 1, 0).pictures(latents)
    assert pictures.shape == (3, 4, 10, 3)
    for frame, row, column in ((0, 0, 0), (2, 3, 9), (1, 2, 5)):
        position = latents[:, frame, row // 2, column // 2]
        values = (position @ weight + bias).view(2, 2, 3)
        expected = values[row % 2, column % 2].clamp(0, 1)
        assert torch.allclose(pictures[frame, row, column], expected, atol=1e-6)


def test_frames_are_averaged_as_latent_frames_stand_for_them() -> None:
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 16, 16)
    pictures = shrunk(video, torch.Size((1, 16, 3, 2, 2)), 2)
    assert pictures.shape == (3, 3, 4, 4)
    assert pictures[:, 0, 0, 0].tolist() == [0, 2.5, 6.5]
    assert shrunk(video[:, :, :1], torch.Size((1, 16, 1, 2, 2)), 2).shape == (1, 3, 4, 4)


def test_too_few_videos_are_refused(vae: AutoencoderKLWan) -> None:
    with pytest.raises(PreviewMapError, match=f"{MIN_VIDEOS - 1} videos .* at least {MIN_VIDEOS}"):
        fit_preview_map(vae, smooth_latents(MIN_VIDEOS - 1), "vae")


def test_latents_that_are_not_finite_are_refused(vae: AutoencoderKLWan) -> None:
    latents = smooth_latents(MIN_VIDEOS)
    latents[0][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(PreviewMapError, match="NaN or infinity"):
        fit_preview_map(vae, latents, "vae")


def test_a_saved_map_is_read_again(fitted: PreviewMap, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    save_preview_map(fitted, path)
    found = load_preview_map(path, MODEL)
    assert torch.allclose(found.weight, fitted.weight, atol=1e-6)
    assert torch.allclose(found.bias, fitted.bias, atol=1e-6)
    assert len(found.leading) == len(fitted.leading) == 2
    for read, expected in zip(found.leading, fitted.leading, strict=True):
        assert torch.allclose(read[0], expected[0], atol=1e-6)
        assert torch.allclose(read[1], expected[1], atol=1e-6)
    same = replace(found, weight=fitted.weight, bias=fitted.bias, leading=fitted.leading)
    assert same == replace(fitted, r2=round(fitted.r2, 4), rms_error=round(fitted.rms_error, 2))


def test_a_file_of_format_1_has_one_map_for_all_frames(fitted: PreviewMap, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    save_preview_map(replace(fitted, leading=()), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    found = load_preview_map(path, MODEL)
    assert found.leading == ()
    frame = smooth_latents(1)[0][0, :, :1]
    assert torch.equal(found.pictures(frame), found.pictures(torch.cat([frame] * 2, 1))[1:])


def test_the_first_two_frames_have_maps_of_their_own() -> None:
    zeros = torch.zeros(4, 12)
    leading = tuple((zeros, torch.full((12,), value)) for value in (0.25, 0.5))
    found = PreviewMap("vae", 2, zeros, torch.full((12,), 0.75), 1, 1, 0, leading)
    pictures = found.pictures(torch.rand(4, 4, 2, 5))
    assert [frame.unique().tolist() for frame in pictures] == [[0.25], [0.5], [0.75], [0.75]]
    assert found.pictures(torch.rand(4, 1, 2, 5)).unique().tolist() == [0.25]


def test_one_frame_is_enough_to_fit_a_map_of_pictures(vae: AutoencoderKLWan) -> None:
    pictures = fit_preview_map(vae, [each[:, :, :1] for each in smooth_latents(6)], "vae")
    assert len(pictures.leading) == 1
    assert torch.equal(pictures.weight, pictures.leading[0][0])


def test_a_map_of_another_vae_is_refused_by_both_names(
    fitted: PreviewMap, tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "map.json"
    save_preview_map(fitted, path)
    config = model / "vae" / "config.json"
    values = json.loads(config.read_text()) | {"latents_mean": [0.0] * 16}
    config.write_text(json.dumps(values))
    with pytest.raises(PreviewMapError) as refused:
        load_preview_map(path, model)
    assert fitted.vae_fingerprint in str(refused.value)
    assert vae_fingerprint(model) in str(refused.value)
    assert f"python -m quant preview-map --model {model} --out {path}" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "has preview map format 3, this tool reads 1 and 2"),
        ({"bias": [0.0]}, "not those of 2 x 2 pixels"),
        ({"weight": "much"}, "is not a preview map"),
        ({"first_bias": [0.0]}, "not those of 2 x 2 pixels"),
        ({"first_weight": [[0.0] * 12] * 4}, "another number of channels"),
        ({"weight": [[float("nan")] * 12] * 16}, "NaN or infinity"),
    ],
)
def test_a_file_that_is_no_map_is_refused(
    fitted: PreviewMap, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "map.json"
    save_preview_map(fitted, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PreviewMapError, match=said):
        load_preview_map(path, MODEL)


def test_a_missing_map_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(PreviewMapError, match="make one with: python -m quant preview-map"):
        load_preview_map(tmp_path / "none.json", MODEL)


def test_the_fingerprint_is_of_the_vae_alone(model: Path) -> None:
    before, whole = vae_fingerprint(model), model_fingerprint(model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"flow_shift": 9.0}))
    assert vae_fingerprint(model) == before
    assert model_fingerprint(model) != whole
    (weights,) = (model / "vae").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert vae_fingerprint(model) != before


def test_the_miniatures_own_map_is_for_its_vae_and_close() -> None:
    shipped = load_preview_map(MODEL / "scales" / "preview-map.json", MODEL)
    assert shipped.r2 > 0.7
