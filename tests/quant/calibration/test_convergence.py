"""When scales have settled: the definition, the end of a calibration by it, and what shows it."""

import dataclasses

import pytest
import torch

from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.checkpoint import Checkpoint
from quant.calibration.convergence import WINDOW, Convergence, check_convergence, parse_share
from quant.calibration.scales import Scales, save_scales
from quant.calibration.summary import describe_scales
from quant.errors import CalibrationError
from quant.numerics.granularity import PerToken
from quant.numerics.scaling import POLICIES


def followed(recipe, *rows: list[float]) -> Convergence:
    """Follow tensors with these largest magnitudes by prompt, in the second of two groups."""
    amax = torch.stack([torch.tensor(rows) / 1024, torch.tensor(rows)], 1)
    return Convergence.of(recipe, amax)


def test_a_scale_is_settled_when_the_last_prompts_have_not_changed_it(tiny_recipe):
    at_once = [8.0] + [9.0] * 11  # the same power of two
    in_the_third = [8.0, 8.0, 16.0] + [9.0] * 9
    at_last = [8.0] * 11 + [100.0]
    found = followed(tiny_recipe, at_once, in_the_third, at_last)
    assert found.settled == (*[0.0] * WINDOW, 2 / 3, 2 / 3, 1.0, 2 / 3)
    assert found.final == (*[1 / 3] * 2, *[2 / 3] * 9, 1.0)
    assert found.is_reached(0.66)
    assert not found.is_reached(0.67)
    assert [line.split() for line in found.table().splitlines()[1:]] == [
        ["1", "33.3%", "-"],
        ["2", "33.3%", "-"],
        ["4", "66.7%", "-"],
        ["8", "66.7%", "-"],
        ["12", "100.0%", "66.7%"],
    ]


def test_few_prompts_settle_nothing(tiny_recipe):
    assert not followed(tiny_recipe, [8.0] * WINDOW).is_reached(0.01)
    assert followed(tiny_recipe, [8.0] * (WINDOW + 1)).is_reached(1.0)


@pytest.fixture
def plan(tiny_plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(tiny_plan, until=0.5)


def test_a_calibration_ends_when_enough_has_settled(tiny_pipe, plan, tiny_scales, tmp_path):
    checkpoint = Checkpoint.beside(tmp_path / "scales")
    scales = run_calibration(tiny_pipe, plan, checkpoint=checkpoint)
    assert scales.num_prompts == WINDOW + 1 < len(plan.prompts.prompts)
    assert torch.equal(scales.act_amax, tiny_scales.act_amax[:, :, : WINDOW + 1])
    first = dataclasses.replace(plan, until=None, prompts=plan.prompts.first(WINDOW + 1))
    save_scales(scales, tmp_path / "until")
    save_scales(run_calibration(tiny_pipe, first), tmp_path / "first")
    assert (tmp_path / "until").read_bytes() == (tmp_path / "first").read_bytes()
    steps: list[int] = []
    again = run_calibration(tiny_pipe, plan, lambda done, _: steps.append(done), checkpoint)
    assert steps == [(WINDOW + 1) * 4]  # nothing was run again
    assert torch.equal(again.act_binades, scales.act_binades)
    told = describe_scales(scales, tmp_path / "until")
    share = Convergence.of(scales.recipe, scales.act_amax).settled[-1]
    assert f"{share:.1%} of 20 scales, which the last 8 of 9 prompts have not changed" in told


def test_scales_that_cannot_be_followed_are_refused(tiny_pipe, plan, tiny_scales, tmp_path):
    by_token = dataclasses.replace(plan.recipe, act_granularity=PerToken())
    with pytest.raises(CalibrationError, match="no number of prompts changes its scales: leave"):
        check_convergence(by_token)
    by_histogram = dataclasses.replace(plan.recipe, act_policy=POLICIES["sqnr"])
    with pytest.raises(CalibrationError, match="chooses scales by 'sqnr', from a histogram"):
        run_calibration(tiny_pipe, dataclasses.replace(plan, recipe=by_histogram))
    scales: Scales = dataclasses.replace(tiny_scales, recipe=by_histogram)
    save_scales(scales, tmp_path / "sqnr")
    assert "not known: these scales do not follow from the largest magnitudes" in describe_scales(
        scales, tmp_path / "sqnr"
    )


def test_a_share_is_a_percentage_or_a_fraction():
    assert parse_share(None) is None
    assert parse_share("99%") == parse_share("0.99") == 0.99
    for wrong in ("0%", "101%", "nan", "-1", "all", ""):
        with pytest.raises(CalibrationError, match="must be a share of the scales above 0%"):
            parse_share(wrong)
