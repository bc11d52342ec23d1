"""Test the parts of QAT: gradients, the order of samples, noise, verdicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant.errors import StudyError
from quant.studies.methods.formats import HIF4, HIF8, INT4, INT8
from quant.studies.methods.operand import Operand, PerRow, PerTensor
from quant.studies.methods.registry import METHODS
from quant.studies.qat.clips import Clip
from quant.studies.qat.grid import Grid, Run, grid_of, read_grid
from quant.studies.qat.qat_report import findings
from quant.studies.qat.samples import FlowLesson, indices, relative_error
from quant.studies.qat.straight_through import (
    StaticScale,
    TrainedLinear,
    check_trainable,
    round_through,
    trainable_methods,
)


def test_gradients_pass_within_the_range_and_stop_where_values_saturate() -> None:
    # Codes are x / 0.5, rounded and clamped to ±127: 63.5 is the largest value.
    x = torch.tensor([0.3, -0.6, 63.4, 63.5, 64.0, -1000.0], requires_grad=True)
    operand = Operand(INT8, PerTensor())
    found = round_through(x, operand, StaticScale.of(operand, torch.tensor(0.5)))
    assert found.tolist() == [0.5, -0.5, 63.5, 63.5, 63.5, -63.5]
    torch.autograd.backward((found * torch.arange(1.0, 7.0)).sum())
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3, 4, 0, 0]


def test_scales_from_the_tensor_itself_let_all_gradients_through() -> None:
    x = torch.tensor([[7.0, 3.4, -0.4], [0.14, 0.055, 0.02]], requires_grad=True)
    found = round_through(x, Operand(INT4, PerRow()))
    assert found.tolist()[0] == [7, 3, 0]
    assert found[1].tolist() == pytest.approx([0.14, 0.06, 0.02])
    torch.autograd.backward(found.square().sum())
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * found.detach())  # the gradient of the square, at the rounded x
    # HiF4's scale, 100/7 rounded to 14, lets 100 be 98 at most.
    group = torch.full((1, 64), 100.0, requires_grad=True)
    found = round_through(group, Operand(HIF4, PerRow()))
    assert set(found.flatten().tolist()) == {98.0}
    torch.autograd.backward(found.sum())
    assert group.grad is not None
    assert group.grad.tolist() == [[1.0] * 64]
    saturated = torch.tensor([1e6], requires_grad=True)
    hif8 = Operand(HIF8, PerTensor())
    rounded = round_through(saturated, hif8, StaticScale.of(hif8, torch.tensor(1.0)))
    torch.autograd.backward(rounded.sum())
    assert saturated.grad is not None
    assert saturated.grad.tolist() == [0]


def test_a_trained_linear_is_the_method_and_its_gradient_that_of_the_rounded_product() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 4)
    trained = TrainedLinear(linear)
    method = METHODS["int4-per-token"]
    x = torch.randn(3, 8, requires_grad=True)
    assert torch.equal(trained(x), linear(x))
    trained.quantize_as(method)
    rounded_x, rounded_weight = method.act.round(x.detach()), method.weight.round(linear.weight)
    expected = rounded_x @ rounded_weight.detach().T + linear.bias
    found = trained(x)
    assert torch.allclose(found, expected, atol=1e-6)
    gradient = torch.randn(3, 4)
    torch.autograd.backward(found, gradient)
    assert linear.weight.grad is not None
    assert x.grad is not None
    assert torch.allclose(linear.weight.grad, gradient.T @ rounded_x, atol=1e-6)
    assert torch.allclose(x.grad, gradient @ rounded_weight.detach(), atol=1e-6)


def test_methods_that_cannot_be_trained_say_why() -> None:
    known = trainable_methods()
    assert {"hif8", "hif4", "int4-per-token", "int8-static", "bf16"} <= set(known)
    for name, words in (
        ("int8-gptq", "rounded once, in calibration"),
        ("attention-hif8", "only linears are trained"),
        ("int8-smooth", "changes the linears' inputs"),
        ("hif8-steps", "depend on the step"),
    ):
        assert name not in known
        with pytest.raises(StudyError, match=words):
            check_trainable(name)


def test_samples_come_once_each_in_an_order_of_the_seed_alone() -> None:
    epoch = [number for step in range(4) for number in indices(0, step, 3, 12)]
    assert sorted(epoch) == list(range(12))
    assert [number for step in range(4) for number in indices(1, step, 3, 12)] != epoch
    assert indices(0, 2, 3, 12) == epoch[6:9]
    across = indices(0, 2, 5, 12)  # two of the first epoch, three of the next
    assert across[:2] == epoch[10:]
    assert len(set(across[2:])) == 3


def test_a_flow_batch_is_noise_and_clip_mixed_and_aims_from_one_to_the_other() -> None:
    draw = torch.Generator().manual_seed(0)
    clips = [
        Clip(torch.randn(2, 1, 4, 4, generator=draw), torch.full((3, 5), float(number + 1)))
        for number in range(6)
    ]
    lesson = FlowLesson(clips, torch.zeros(3, 5), 3.0)
    found = lesson.batch(0, 7, 4, 6)
    sigma = (found.timestep / 1000).view(-1, 1, 1, 1, 1)
    chosen = torch.stack([clips[number].latents for number in indices(0, 7, 4, 6)])
    assert torch.allclose(found.latents - sigma * found.target, chosen, atol=1e-5)
    again = lesson.batch(0, 7, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, again.tensors, strict=True))
    texts = torch.cat([lesson.batch(0, step, 4, 6).text[:, 0, 0] for step in range(200)])
    assert 0.05 < float((texts == 0).float().mean()) < 0.15  # the negative prompt's share
    exam = lesson.examination(2, 4)
    assert exam.timestep.tolist() == sorted(exam.timestep.tolist())
    assert torch.equal(exam.target, lesson.examination(2, 4).target)
    assert torch.equal(exam.text[0], clips[2].text)


def test_an_error_is_a_share_of_the_reference() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    found = torch.tensor([[3.0, 3.0], [1.0, 2.0]])
    assert relative_error(found, reference).tolist() == pytest.approx([1 / 25, 4])


def test_a_grid_is_a_product_of_its_tables_with_a_control_for_each_combination(
    tmp_path: Path,
) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        'steps = [20, 5]\n[[grid]]\nmethods = ["hif8", "hif4"]\nlearning_rates = [1e-5, 1e-4]\n'
        "batches = [1, 4]\ndata = [8]\n"
        '[[grid]]\nmethods = ["hif4"]\nlearning_rates = [1e-4]\nbatches = [4]\ndata = [8, 16]\n'
    )
    grid = read_grid(file)
    assert grid.steps == (5, 20)
    assert len(grid.runs) == 9  # the second table repeats one of the first
    assert grid.methods == ("hif8", "hif4")
    assert len(grid.controls) == 5
    ordered = grid.ordered
    assert len(ordered) == 14
    assert [run.method for run in ordered] == ["bf16"] * 5 + ["hif8"] * 4 + ["hif4"] * 5
    assert [run.batch for run in ordered if run.method == "hif8"] == [1, 1, 4, 4]


def test_the_grid_that_ships_asks_the_papers_question() -> None:
    grid = read_grid(Path("docs/studies/qat-grid.toml"))
    assert set(grid.methods) == {"hif8", "hif4", "int4-per-token", "int8-static"}
    assert 1 in {run.batch for run in grid.runs}
    for option in ("learning_rate", "batch", "data"):
        assert len({getattr(run, option) for run in grid.runs}) > 1
    grid.check_data(64, 8, "prompts")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = [1", "cannot be read as a grid"),
        ("steps = []\n[[grid]]\n", "methods of a grid must be a list"),
        ("steps = [1]\nmore = 1\n[[grid]]\n", "and nothing else"),
        ('steps = [1]\n[[grid]]\nmethod = ["hif8"]\n', "has 'method' in"),
        (
            'steps = [1]\n[[grid]]\nmethods = ["hif8"]\nlearning_rates = [inf]\nbatches = [1]\n'
            "data = [1]\n",
            "learning rate inf must be",
        ),
        (
            'steps = [1]\n[[grid]]\nmethods = ["hif8"]\nlearning_rates = [0.1]\nbatches = [0]\n'
            "data = [1]\n",
            "0 in batches must be from 1",
        ),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    with pytest.raises(StudyError, match=words):
        read_grid(file)


def test_options_combine_like_a_grid() -> None:
    options: dict[str, list[Any]] = {
        "methods": ["hif4"],
        "learning_rates": [1e-4],
        "batches": [1, 2],
        "data": [8],
        "seeds": [0, 1],
    }
    assert grid_of(options, [3]) == Grid(
        tuple(Run("hif4", batch, 8, 1e-4, seed) for batch in (1, 2) for seed in (0, 1)), (3,)
    )
    twice = options | {"methods": ["hif4", "hif4"], "batches": [1, 2, 1]}
    assert grid_of(twice, [3, 3]) == grid_of(options, [3]), "no run is trained twice"


def cell(mean: float, outcome: str, against_control: str) -> dict[str, Any]:
    against = {"mean": mean - 1.0, "holm_p": 0.001, "outcome": outcome}
    return {
        **{"method": "hif4", "learning_rate": 1e-4, "batch": 1, "data": 8, "seed": 0, "step": 5},
        "diverged": False,
        "velocity": {
            "mean": mean,
            "gain_db": 3.0,
            "against_ptq": against,
            "against_control": against | {"outcome": against_control},
        },
    }


@pytest.mark.parametrize(
    ("outcome", "against_control", "words"),
    [
        ("better", "better", "so it is training through the rounding that helps"),
        ("better", "worse", "more training helps, and QAT does not"),
        ("better", "not told apart", "that QAT helps, and not training itself, is not shown"),
        ("worse", "better", "No training is shown to beat PTQ; the least is 50 %"),
    ],
)
def test_findings_claim_no_more_than_both_comparisons(
    outcome: str, against_control: str, words: str
) -> None:
    found = cell(0.5, outcome, against_control)
    control = {**found, "velocity": {"hif4": {"mean": 0.8}, "bf16": {"mean": 0.1}}}
    ptq = {"hif4": {"velocity": {"mean": 1.0}}, "bf16": {"velocity": {"mean": 0.01}}}
    results = {
        "steps": [5],
        "methods": ["hif4"],
        "measures": {"velocity": {"prompts": 12, "values": 24}},
        "ptq": ptq,
        "controls": [control],
        "cells": [found],
    }
    sentences = findings(results)
    assert words in sentences[0]
    assert "takes the error energy of the velocity from 1 % to 10 % after" in sentences[1]
    assert len(sentences) == 2
    few = results | {"measures": {"velocity": {"prompts": 5, "values": 10}}}
    assert "5 prompts are too few for 1 trainings" in findings(few)[-1]
