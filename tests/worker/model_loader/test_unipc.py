"""Test that our UniPC is diffusers' own to the last bit, with only latents on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.model_loader.scheduler import read_scheduler, scheduler_for_run, scheduler_name
from worker.model_loader.unipc import HostUniPC

WAN: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
SHAPE = (1, 4, 2, 6, 6)


def run(kind: type[UniPCMultistepScheduler], steps: int, **settings: Any) -> list[Tensor]:
    """Denoise with a model that is not smooth; return the latents after each step."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(steps)
    sample, found = torch.randn(SHAPE, generator=generator), []
    for timestep in scheduler.timesteps:
        output = (sample * 3).sin() + torch.randn(SHAPE, generator=generator) / 9
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        found.append(sample)
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_it_is_diffusers_own_to_the_last_bit(
    order: int, solver_type: str, predict_x0: bool
) -> None:
    settings: dict[str, Any] = {
        "solver_order": order,
        "solver_type": solver_type,
        "predict_x0": predict_x0,
    }
    # Without x0, diffusers knows no flows.
    settings |= WAN if predict_x0 else WAN | {"prediction_type": "epsilon"}
    for steps in (1, 2, 3, 20):
        expected = run(UniPCMultistepScheduler, steps, **settings)
        found = run(HostUniPC, steps, **settings)
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            # Some combinations end in NaN, without ours as well.
            assert torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True), (steps, step)


def test_a_run_of_the_miniature_uses_it_with_the_model_s_settings(model_folder: Path) -> None:
    template = read_scheduler(model_folder)
    scheduler = scheduler_for_run(template, 5.0)
    assert isinstance(scheduler, HostUniPC)
    assert scheduler.config.flow_shift == 5.0
    changed = {"flow_shift": 3.0, "_class_name": "UniPCMultistepScheduler"}
    assert dict(scheduler.config) | changed == dict(template.config)
    assert scheduler_name(scheduler) == "UniPCMultistepScheduler"


class Recorder(TorchDispatchMode):
    """Records operations that touch a device, and copies from it to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.to_host: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        used = [each for each in (*inputs, *outputs) if each.is_meta]
        if used and function.namespace != "prim":  # which asks for properties
            self.on_device.add(function._schema.name)
            self.dtypes |= {each.dtype for each in used}
            from_device = any(each.is_meta for each in inputs)
            if from_device and not any(each.is_meta for each in outputs):
                self.to_host.append(function._schema.name)
        return result


def steps_on_a_device(kind: type[UniPCMultistepScheduler], **settings: Any) -> Recorder:
    """Run steps on the device `meta`, which computes shapes only and cannot be read."""
    scheduler = kind(**WAN, **settings)
    scheduler.set_timesteps(4, device="cpu")
    scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps.tolist()
    with Recorder() as recorder:
        sample = torch.empty(SHAPE, device="meta")
        for timestep in timesteps:
            output = torch.empty(SHAPE, device="meta", dtype=torch.bfloat16)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
            assert sample.is_meta
    return recorder


def test_a_step_neither_solves_on_the_device_nor_waits_for_it() -> None:
    theirs = steps_on_a_device(UniPCMultistepScheduler)
    assert "aten::_linalg_solve_ex" in theirs.on_device, "or this test would show nothing"
    ours = steps_on_a_device(HostUniPC)
    assert ours.to_host == []
    assert ours.dtypes == {torch.float32, torch.bfloat16}
    # Arithmetic on latents alone: no logarithms, no systems, not one copy.
    assert ours.on_device <= {"aten::empty", "aten::mul", "aten::sub", "aten::add", "aten::div"}


def test_a_higher_order_copies_its_weights_and_nothing_else() -> None:
    ours = steps_on_a_device(HostUniPC, solver_order=3)
    assert ours.to_host == []
    assert not {name for name in ours.on_device if "solve" in name or "log" in name}
