"""Test that points are what the transformer was really given, and that recording goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quant.cli import app
from quant.errors import StudyError
from quant.studies.points import open_points
from quant.studies.record import spread_steps

PROMPTS = [f"a {shape}" for shape in "abcdefgh"]


def record(model: Path, out: Path, *options: str) -> Any:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["record", "--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    small = ["--steps", "4", "--keep", "2", "--frames", "1", "--size", "32x32"]
    small += ["--text-tokens", "16"]
    return CliRunner().invoke(app, [*arguments, *small, *options])


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "points"
    result = record(tiny_model, out)
    assert result.exit_code == 0, result.output
    assert "32 points of 8 prompts" in result.output
    return out


def test_points_are_of_both_branches_of_the_kept_steps(recorded: Path) -> None:
    points = list(open_points(recorded))
    assert [(each.step, each.branch) for each in points[:4]] == [
        (1, "prompt"), (1, "negative"), (3, "prompt"), (3, "negative"),
    ]  # fmt: skip
    assert len({each.prompt for each in points}) == 8
    assert points[0].latents.shape == (1, 16, 1, 4, 4)
    assert points[0].timestep > points[2].timestep
    assert not torch.equal(points[0].text, points[1].text)
    assert torch.equal(points[0].latents, points[1].latents)


def test_recording_goes_on_with_equal_bytes(tiny_model: Path, recorded: Path) -> None:
    file = recorded / "00003.safetensors"
    before = file.read_bytes()
    file.unlink()
    assert record(tiny_model, recorded).exit_code == 0
    assert file.read_bytes() == before


def test_prompts_that_run_together_are_those_that_run_alone(
    tiny_model: Path, recorded: Path, tmp_path: Path
) -> None:
    """But for their last bits; and a batch of which a part was kept runs again as a whole."""
    out = tmp_path / "together"
    assert record(tiny_model, out, "--batch", "3").exit_code == 0
    for ours, alone in zip(open_points(out), open_points(recorded), strict=True):
        assert (ours.name, ours.prompt) == (alone.name, alone.prompt)
        assert torch.equal(ours.timestep, alone.timestep)
        assert torch.allclose(ours.latents, alone.latents, rtol=0.02, atol=0.02)
        assert torch.allclose(ours.text.float(), alone.text.float(), rtol=0.02, atol=0.02)
    before = {
        name: (out / name).read_bytes() for name in ("00003.safetensors", "00004.safetensors")
    }
    (out / "00004.safetensors").unlink()
    assert record(tiny_model, out, "--batch", "3").exit_code == 0
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("option", "value"), [("batch", 2), ("device", "cuda")])
def test_points_of_another_batch_or_device_do_not_mix(
    tiny_model: Path, recorded: Path, tmp_path: Path, option: str, value: object
) -> None:
    """A kill, and a second start that would give other last bits."""
    out = tmp_path / "points"
    shutil.copytree(recorded, out)
    (out / "00007.safetensors").unlink()
    index = json.loads((out / "points.json").read_text())
    assert (index["batch"], index["device"]) == (1, "cpu")
    (out / "points.json").write_text(json.dumps(index | {option: value}))
    result = record(tiny_model, out)
    assert result.exit_code == 1
    assert f"holds other points, of another {option}: name another folder" in result.output
    assert not (out / "00007.safetensors").exists()
    old = {name: each for name, each in index.items() if name not in {"batch", "device"}}
    (out / "points.json").write_text(json.dumps(old))
    assert "of another batch" in record(tiny_model, out, "--batch", "2").output
    assert open_points(recorded).info.batch == open_points(out, complete=False).info.batch
    assert record(tiny_model, out).exit_code == 0


def test_other_settings_do_not_mix(tiny_model: Path, recorded: Path) -> None:
    result = record(tiny_model, recorded, "--seed", "5")
    assert result.exit_code == 1
    assert "holds other points" in result.output


def test_kept_steps_are_spread() -> None:
    assert spread_steps(4, 20) == (2, 7, 12, 17)
    assert spread_steps(3, 3) == (0, 1, 2)
    with pytest.raises(StudyError, match="5 steps to keep must be between 1 and the 4"):
        spread_steps(5, 4)
