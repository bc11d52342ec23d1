"""Test that points come back as they were kept, and that wrong ones are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.calibration.sampler import SamplerSettings
from quant.errors import StudyError
from quant.studies.points import (
    PointsFolder,
    PointsInfo,
    new_points,
    open_points,
)

SAMPLER = SamplerSettings((96, 96), 17, 20, 4.0, 64, seed=7)
INFO = PointsInfo("sha256:model", ("a", "b"), "digest", "prompts.txt", SAMPLER, (0, 10))


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, 16, 5, 12, 12, generator=draw),
        "timesteps": torch.tensor([999.0, 400.0]),
        "prompt": torch.randn(64, 32, generator=draw).bfloat16(),
        "negative": torch.randn(64, 32, generator=draw).bfloat16(),
    }


@pytest.fixture
def points(tmp_path: Path) -> PointsFolder:
    folder = new_points(tmp_path / "points", INFO)
    for number in range(2):
        folder.write(number, tensors(number))
    return folder


def test_points_come_back(points: PointsFolder) -> None:
    found = list(open_points(points.path))
    assert len(found) == INFO.points == 8
    assert [each.name for each in found[:3]] == ["7/0/prompt", "7/0/negative", "7/10/prompt"]
    assert torch.equal(found[2].latents, tensors(0)["latents"][1:])
    assert torch.equal(found[5].text[0], tensors(1)["negative"])
    assert found[2].timestep.tolist() == [400.0]


def test_recording_goes_on_and_is_not_taken_for_whole(tmp_path: Path) -> None:
    folder = new_points(tmp_path / "points", INFO)
    folder.write(0, tensors(0))
    with pytest.raises(StudyError, match="lacks the points of 1 of 2 prompts"):
        open_points(folder.path)
    again = new_points(tmp_path / "points", INFO)
    assert (again.has(0), again.has(1)) == (True, False)
    with pytest.raises(StudyError, match="holds other points"):
        new_points(tmp_path / "points", replace(INFO, steps=(0, 5)))


def test_points_are_checked(points: PointsFolder) -> None:
    points.check_model("sha256:model")
    with pytest.raises(StudyError, match="recorded from another model"):
        points.check_model("sha256:other")
    points.check_apart(frozenset({"c"}), "the calibration")
    with pytest.raises(StudyError, match=r"1 prompts of .* are also in the calibration.*'b'"):
        points.check_apart(frozenset({"b"}), "the calibration")
    bad = tensors(0) | {"latents": torch.full((2, 16, 5, 12, 12), torch.nan)}
    with pytest.raises(StudyError, match="latents of prompt 'a' has NaN"):
        points.write(0, bad)


def test_a_damaged_file_and_another_folder_are_refused(points: PointsFolder) -> None:
    (points.path / "00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="cannot be read: run `python -m quant record` again"):
        list(open_points(points.path))
    with pytest.raises(StudyError, match="is not a folder of points"):
        open_points(points.path.parent)
