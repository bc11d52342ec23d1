"""Test that an interrupted calibration goes on, with the same file in the end, to the last bit."""

import dataclasses
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.checkpoint import Checkpoint
from quant.calibration.prompts import PromptSet
from quant.calibration.scales import Scales, save_scales
from quant.errors import CalibrationError

STEPS = 4


def interrupted_after(step: int):
    def on_step(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.beside(tmp_path / "scales.safetensors")


@pytest.fixture
def half_done(tiny_pipe, tiny_plan, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of a calibration that ended in the second step of the fourth prompt."""
    with pytest.raises(KeyboardInterrupt):
        run_calibration(tiny_pipe, tiny_plan, interrupted_after(3 * STEPS + 2), checkpoint)
    return checkpoint


def written(scales: Scales, path: Path) -> bytes:
    save_scales(scales, path)
    return path.read_bytes()


def test_an_interrupted_calibration_writes_the_same_bytes(
    tiny_pipe, tiny_plan, tiny_scales, half_done, tmp_path
):
    progress: list[int] = []
    with pytest.raises(KeyboardInterrupt):  # once more, at another place
        run_calibration(tiny_pipe, tiny_plan, interrupted_after(5 * STEPS), half_done)
    again = run_calibration(tiny_pipe, tiny_plan, lambda done, _: progress.append(done), half_done)
    assert progress[0] == 4 * STEPS  # the fifth prompt's last step came before its checkpoint
    assert progress[1:] == list(range(4 * STEPS + 1, 10 * STEPS + 1))
    assert written(again, tmp_path / "again") == written(tiny_scales, tmp_path / "at once")


def test_a_finished_checkpoint_needs_no_step(
    tiny_pipe, tiny_plan, tiny_scales, checkpoint, tmp_path
):
    run_calibration(tiny_pipe, tiny_plan, checkpoint=checkpoint)
    again = run_calibration(tiny_pipe, tiny_plan, interrupted_after(1), checkpoint)
    assert written(again, tmp_path / "again") == written(tiny_scales, tmp_path / "at once")


def other_prompts(plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(plan, prompts=PromptSet(plan.prompts.prompts[::-1], "other.txt"))


def other_sampler(plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(plan, sampler=dataclasses.replace(plan.sampler, seed=1))


def other_model(plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(plan, model_fingerprint="sha256:00")


def other_recipe(plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, attention="fp8"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_prompts, "set of prompts"),
        (other_sampler, "setting of the sampler"),
        (other_model, "model"),
        (other_recipe, "recipe"),
    ],
)
def test_the_checkpoint_of_another_calibration_is_refused_and_kept(
    tiny_pipe, tiny_plan, half_done, change, what
):
    before = half_done.path.read_bytes()
    expected = f"{half_done.path} holds 3 prompts of a calibration with another {what}: finish"
    with pytest.raises(CalibrationError, match=re.escape(expected)):
        run_calibration(tiny_pipe, change(tiny_plan), checkpoint=half_done)
    assert half_done.path.read_bytes() == before


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [without_metadata, cut])
def test_a_damaged_checkpoint_is_refused(tiny_pipe, tiny_plan, half_done, damage):
    damage(half_done.path)
    with pytest.raises(CalibrationError, match=r"cannot be read, .* delete it to begin anew"):
        run_calibration(tiny_pipe, tiny_plan, checkpoint=half_done)


def test_a_checkpoint_that_cannot_be_written_says_where_it_goes_on(tiny_pipe, tiny_plan, tmp_path):
    checkpoint = Checkpoint.beside(tmp_path / "gone" / "scales")
    with pytest.raises(CalibrationError, match=r"cannot write .*scales\.partial: No such file"):
        run_calibration(tiny_pipe, tiny_plan, checkpoint=checkpoint)


def test_nothing_but_the_checkpoint_is_left_in_the_folder(half_done):
    assert list(half_done.path.parent.iterdir()) == [half_done.path]
